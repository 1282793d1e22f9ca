#!/usr/bin/env python3
"""Three raters go through a small study in a headless Chromium: with a reload, a break, a restart of the server, pages that
are sent twice and a wrong link. Then the figures of the report are computed again from the ratings that were entered.
A second study has answers of a model and of a person. Called by human_pages.sh.
"""
import csv
import http.client
import json
import math
import signal
import struct
import subprocess
import sys
import tempfile
import urllib.parse
import zlib
from itertools import permutations
from pathlib import Path

import chromium
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

VILG = sys.argv[1]
SHOTS = Path(sys.argv[2]) if len(sys.argv) > 2 else None
QUESTIONS = ["clarity", "texture", "relevance"]
PROMPTS = [("style", "水墨画风格的荷塘"), ("style", "剪纸风格的<生肖龙> & 灯笼"), ("view", "从高空俯瞰梯田")]
# The red of an image tells the script, and only the script, which system made it, and its green which prompt it is for.
REDS = {"secret-ours": 200, "secret-other": 60}
T_975_OF_2 = 4.302652729749462


def png(path, red, green, size=96):
    """Stripes, so that the screenshots show more than a colour."""
    row = lambda y: b"\0" + bytes(v for x in range(size) for v in (red, green, 255 if (x // 12 + y // 12) % 2 else 40))
    data = zlib.compress(b"".join(row(y) for y in range(size)))
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def vilg(*args):
    done = subprocess.run([VILG, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (args, done.stderr)
    return done.stdout


class Server:
    def __init__(self, study, address="127.0.0.1:0"):
        command = [VILG, "eval", "human", "serve", str(study), "--address", address, "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started = json.loads(self.process.stdout.readline())
        self.address = self.started["address"]
        self.links = [rater["url"] for rater in self.started["raters"]]

    def stop(self, which, code):
        self.process.send_signal(which)
        _, said = self.process.communicate(timeout=20)
        assert self.process.returncode == code and "all ratings are saved" in said, (self.process.returncode, said)

    def request(self, path, body=None):
        connection = http.client.HTTPConnection(self.address, timeout=10)
        connection.request("GET" if body is None else "POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace"), answer.headers


def browser():
    return chromium.browser(1180, 1060)


def shot(page, name):
    chromium.shot(page, SHOTS, name)


def progress(page):
    done, pages = page.find_element(By.ID, "progress").text.split(" / ")
    return int(done), int(pages)


def check_page(page, server, secrets):
    """Nothing on the page names a system or comes from elsewhere, and the browser has no complaints."""
    source = page.page_source
    for secret in [*secrets, ".png", "study"]:
        assert secret not in source, f"`{secret}` is on the page"
    assert chromium.check_origins(page, f"http://{server.address}/")


def pixel(page, image):
    """Red and green of an image's first pixel."""
    script = """const image = arguments[0], canvas = document.createElement("canvas");
        const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
        return [image.complete && image.naturalWidth, ...context.getImageData(0, 0, 1, 1).data];"""
    width, red, green, *_ = page.execute_script(script, image)
    assert width == 96, "the image is not shown"
    return red, green


def value_for(rater, prompt, system, question):
    """Any rating that differs by rater, prompt, system and question."""
    first = 1 + (2 * prompt + QUESTIONS.index(question) + rater * prompt) % 4
    return first if system == "secret-other" else max(1, first + [1, 1, -2][(prompt + QUESTIONS.index(question)) % 3])


def rate_page(page, rater, entered, keys):
    """Rates both images of the page and sends it; returns the system on the left."""
    outputs = page.find_elements(By.CLASS_NAME, "output")
    assert len(outputs) == 2
    shown = []
    for place, output in enumerate(outputs):
        red, green = pixel(page, output.find_element(By.TAG_NAME, "img"))
        system = next(name for name, own in REDS.items() if own == red)
        shown.append((system, green))
        for question in QUESTIONS:
            value = value_for(rater, green, system, question)
            entered[rater, green, system, question] = value
            if keys:
                page.switch_to.active_element.send_keys(str(value))
            else:
                output.find_element(By.CSS_SELECTOR, f'input[name="{place}.{question}"][value="{value}"]').click()
    assert shown[0][1] == shown[1][1], "both images belong to one prompt"
    assert page.find_element(By.TAG_NAME, "h1").text == PROMPTS[shown[0][1]][1]
    return shown[0][0]


def send(page, keys):
    old = page.find_element(By.TAG_NAME, "html")
    if keys:
        page.switch_to.active_element.send_keys(Keys.ENTER)
    else:
        page.find_element(By.ID, "send").click()
    for _ in range(200):
        try:
            old.is_enabled()
        except Exception:  # the old page is gone
            return
    raise AssertionError("the page was not sent")


def rate_images(folder):
    for system, red in REDS.items():
        for prompt in range(len(PROMPTS)):
            png(folder / system / f"a-{prompt + 1}.png", red, prompt)
    (folder / "prompts.tsv").write_text("aspect\tprompt\n" + "".join(f"{a}\t{p}\n" for a, p in PROMPTS))
    study = folder / "images.db"
    new = ["eval", "human", "new", study, "--prompts", folder / "prompts.tsv", "--seed", 5, "--title", "图像评测 Images"]
    for system in REDS:
        new += ["--images", f"{system}={folder / system}"]
    vilg(*new)
    server, page, entered, left = Server(study), browser(), {}, []
    try:
        assert len(server.links) == 3 and len(set(server.links)) == 3
        for rater, link in enumerate(server.links):
            page.get(link)
            shot(page, f"start-{rater}")
            assert progress(page) == (0, 3)
            page.find_element(By.ID, "next").click()
            for done in range(3):
                check_page(page, server, REDS)
                assert progress(page) == (done, 3)
                if rater == 0 and done == 1:
                    # Half an answer, a reload and the same page again; then a break, and another server.
                    page.find_element(By.CSS_SELECTOR, 'input[value="5"]').click()
                    before = page.current_url
                    page.refresh()
                    assert page.current_url == before and progress(page) == (1, 3)
                    page.quit()
                    server.stop(signal.SIGTERM, 75)
                    server, page = Server(study, server.address), browser()
                    assert server.links[rater] == link
                    page.get(link)
                    assert progress(page) == (1, 3)
                    page.find_element(By.ID, "next").click()
                keys = rater == 1
                left.append(rate_page(page, rater, entered, keys))
                shot(page, f"page-{rater}-{done}")
                sent = page.current_url
                send(page, keys)
                if done == 0:
                    send_twice(page, server, sent)
            assert progress(page) == (3, 3) and page.find_element(By.ID, "finished")
            shot(page, f"end-{rater}")
        assert set(left) == set(REDS), "both systems stand on the left now and then"
        wrong_requests(page, server)
        shot(page, "wrong-token")
    finally:
        page.quit()
        server.process.poll() is None and server.stop(signal.SIGINT, 130)
    check_report(folder, study, entered)


def send_twice(page, server, sent):
    """Back, and the same page again: it counts once, and its answers are still chosen."""
    page.get(sent)
    chosen = page.find_elements(By.CSS_SELECTOR, "input:checked")
    assert len(chosen) == 6 and progress(page) == (1, 3)
    form = "&".join(f"{one.get_attribute('name')}={one.get_attribute('value')}" for one in chosen)
    send(page, False)
    path = urllib.parse.urlsplit(sent).path
    assert [server.request(path, form)[0] for _ in range(2)] == [303, 303]
    status, text, _ = server.request(path, form.rsplit("&", 1)[0])
    assert status == 422 and 'id="missing"' in text
    assert server.request(path, form.replace("0.clarity=", "0.clarity=9"))[0] == 400
    assert progress(page) == (1, 3)


def wrong_requests(page, server):
    path = urllib.parse.urlsplit(server.links[0]).path
    for wrong, status in [
        ("/r/" + "0" * 32, 403), (path[:-1], 403), (path + "0/1", 403), ("/r/..%2f..%2fetc%2fpasswd", 403),
        (path + "/0", 404), (path + "/4", 404), (path + "/x", 404), (path + "/1/2", 404), (path + "/1/..%2f..", 404),
        ("/etc/passwd", 404), (path + "/1/0/../../../Cargo.toml", 404),
    ]:
        found, text, headers = server.request(wrong)
        assert found == status and "<h1>" in text, (wrong, found)
        assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
    assert server.request(path + "/1", "x" * 100_000)[0] == 413
    page.get(f"http://{server.address}/r/{'0' * 32}")
    assert "链接无效" in page.find_element(By.TAG_NAME, "h1").text


def mean_and_interval(values, low, high):
    """Of three values."""
    mean = sum(values) / 3
    half = T_975_OF_2 * math.sqrt(sum((value - mean) ** 2 for value in values) / 2 / 3)
    return [mean, max(low, mean - half), min(high, mean + half)]


def alpha(outputs):
    """Krippendorff's alpha from its definition, ordinal metric: all ordered pairs within and over outputs."""
    values = [value for ratings in outputs for value in ratings]
    count = lambda value: values.count(value)
    distance = lambda c, k: (sum(map(count, range(min(c, k), max(c, k) + 1))) - (count(c) + count(k)) / 2) ** 2
    observed = sum(distance(c, k) / (len(ratings) - 1) for ratings in outputs for c, k in permutations(ratings, 2))
    return 1 - observed * (len(values) - 1) / sum(distance(c, k) for c, k in permutations(values, 2))


def near(found, expected):
    assert all(abs(a - b) < 1e-9 for a, b in zip(found, expected, strict=True)), (found, expected)


def check_report(folder, study, entered):
    report = json.loads(vilg("eval", "human", "report", study, "--json", "--csv", folder / "ratings.csv"))
    assert len(entered) == report["ratings"] == 3 * 3 * 2 * 3
    assert [rater["rated"] for rater in report["raters"]] == [3, 3, 3]
    item_mean = lambda p, system, question: sum(entered[rater, p, system, question] for rater in range(3)) / 3
    for question in report["questions"]:
        name, means = question["question"], {}
        for system in question["systems"]:
            means[system["system"]] = [item_mean(p, system["system"], name) for p in range(3)]
            near([system["mean"], *system["interval"]], mean_and_interval(means[system["system"]], 1, 5))
        near([question["alpha"]], [alpha([[entered[r, p, s, name] for r in range(3)] for p in range(3) for s in REDS])])
        paired = [a - b for a, b in zip(means["secret-ours"], means["secret-other"])]
        found = next(one for one in report["differences"] if one["question"] == name)
        assert (found["a"], found["b"]) == ("secret-ours", "secret-other")
        near([found["mean"], *found["interval"]], mean_and_interval(paired, -math.inf, math.inf))
        assert found["wins"] == sum(one > 1e-9 for one in paired)
    assert [(one["aspect"], one["items"]) for one in report["aspects"]] == [("style", 2), ("view", 1)]
    style = next(one for one in report["aspects"][0]["questions"] if one["question"] == "texture")["systems"]
    near([style[1]["mean"]], [(item_mean(0, "secret-other", "texture") + item_mean(1, "secret-other", "texture")) / 2])
    rows = list(csv.DictReader(open(folder / "ratings.csv", encoding="utf-8")))
    found = {(int(r["rater"]) - 1, int(r["item"]) - 1, r["system"], r["question"]): int(r["value"]) for r in rows}
    assert found == entered and len(rows) == len(entered)
    print(vilg("eval", "human", "report", study))


def rate_answers(folder):
    """A model's answers and a person's, each on a page of its own."""
    asked = [("sheep.png", "图中有几只羊？", "三只", "两只"), ("house.png", "这是什么地方？", "山坡上的房子", "乡下")]
    model, people = folder / "secret-model.jsonl", folder / "secret-people.jsonl"
    for path, column in [(model, 2), (people, 3)]:
        lines = [{"image": str(folder / row[0]), "question": row[1], "answer": row[column]} for row in asked]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for number, row in enumerate(asked):
        png(folder / row[0], 120, 100 * number)
    study = folder / "answers.db"
    vilg("eval", "human", "new", study, "--answers", f"secret={model}", "--human", people, "--raters", 3)
    server, page, seen = Server(study), browser(), []
    try:
        page.get(server.links[0])
        page.find_element(By.ID, "next").click()
        for done in range(4):
            check_page(page, server, ["secret", "human"])
            answer = page.find_element(By.CSS_SELECTOR, ".output .text").text
            question = page.find_element(By.TAG_NAME, "h1").text
            row = next(row for row in asked if answer in row[2:])
            assert row[1] in question and pixel(page, page.find_element(By.TAG_NAME, "img"))[1] == 100 * asked.index(row)
            seen.append(row[1])
            # This rater takes the first person's answer and no other for a person's.
            person = int(answer == "两只")
            for name, value in [("quality", 2 - person), ("person", person)]:
                page.find_element(By.CSS_SELECTOR, f'input[name="0.{name}"][value="{value}"]').click()
            shot(page, f"answer-{done}")
            send(page, False)
        assert progress(page) == (4, 4) and sorted(seen[:2]) == sorted(seen[2:]), "each question comes once a round"
    finally:
        page.quit()
        server.stop(signal.SIGINT, 130)
    report = json.loads(vilg("eval", "human", "report", study, "--json"))
    rates = {one["system"]: (one["share"]["mean"], one["majority"]["hits"]) for one in report["pass_rates"]}
    assert rates == {"secret": (0.0, 0), "human": (0.5, 1)}, rates
    quality = {one["system"]: one["mean"] for one in report["questions"][0]["systems"]}
    assert quality == {"secret": 2.0, "human": 1.5}, quality
    assert all(question["alpha"] is None for question in report["questions"]), "one rater does not agree with anyone"


def main():
    with tempfile.TemporaryDirectory() as folder:
        rate_images(Path(folder))
        rate_answers(Path(folder))
    print("the raters' pages work, and the report has the figures of what was entered")


if __name__ == "__main__":
    main()
