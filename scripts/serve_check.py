#!/usr/bin/env python3
"""Drives the page of `vilg serve` as a user would: generate, watch the rows appear, stop, caption, ask, compare, reload, two
tabs, a phone, a server that is stopped in the middle. Then the official `openai` client and curl, and at last the load of 16
clients, some of which leave, send nonsense or are slow: no answer may be lost, and memory must stay flat. Called by
serve_check.sh.
"""
import base64
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import chromium
import openai
from selenium.webdriver.common.by import By

VILG = sys.argv[1]
REQUESTS = int(sys.argv[2])
SHOTS = Path(sys.argv[3]).absolute() if len(sys.argv) > 3 else None
SAMPLE = Path("src/demo/sample.png").absolute()
CLIENTS = 16


class Server:
    def __init__(self, *args, port=0):
        command = [VILG, "serve", "--port", str(port), "--json", *args]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.started = json.loads(self.process.stdout.readline())
        self.url, self.address = self.started["url"], self.started["address"]
        self.port = int(self.address.rsplit(":", 1)[1])

    def stop(self, which=signal.SIGTERM, code=0):
        self.process.send_signal(which)
        _, said = self.process.communicate(timeout=60)
        assert self.process.returncode == code, (self.process.returncode, said)
        return said

    def metric(self, name):
        text = urllib.request.urlopen(self.url + "metrics", timeout=60).read().decode()
        return float(next(line for line in text.splitlines() if line.startswith(name + " ")).rsplit(" ", 1)[1])

    def memory(self):
        """Resident memory in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def browser(width=1100, height=1400):
    return chromium.browser(width, height, "zh-CN")


def shot(page, name):
    chromium.shot(page, SHOTS, name)


def wait(what, is_true, seconds=120):
    begun = time.monotonic()
    while True:
        found = is_true()
        if found:
            return found
        assert time.monotonic() - begun < seconds, f"not within {seconds} s: {what}"
        time.sleep(0.03)


def find(page, id):
    return page.find_element(By.ID, id)


def figures(page, selector="#images figure"):
    return page.find_elements(By.CSS_SELECTOR, selector)


def ready(page):
    wait("the page is ready", lambda: find(page, "state").text in ("就绪", "ready"))


def no_complaints(page, url):
    # Only this script reads the pixels of canvases.
    chromium.check_origins(page, url, expected="willReadFrequently")


def generate(page, prompt, count, seed="", size=None):
    box = find(page, "prompt")
    box.clear()
    box.send_keys(prompt)
    page.execute_script("document.getElementById('count').value = arguments[0]", str(count))
    find(page, "seed").clear()
    find(page, "seed").send_keys(seed)
    find(page, "go").click()


def complete(page, count):
    done = "return document.querySelectorAll('#images figure:not(.waiting) img[alt]:not([alt=\"\"])').length"
    wait(f"{count} images", lambda: page.execute_script(done) == count, 300)


def t2i(folder, prompt, seed):
    path = Path(folder) / "a.png"
    subprocess.run([VILG, "t2i", prompt, "--seed", str(seed), "-o", path], check=True, capture_output=True)
    return path.read_bytes()


def use_the_page(folder):
    server, page = Server(), browser()
    try:
        page.get(server.url)
        ready(page)
        assert not find(page, "ask-form").is_displayed(), "the demo does not answer questions"
        shot(page, "start")
        # Rows appear: a watcher notes what each image shows whenever it changes.
        page.execute_script("""window.seen = []; new MutationObserver((changes) => changes.forEach(({ target }) => {
            if (target.tagName === "IMG" && target.src) window.seen.push([[...document.querySelectorAll("#images img")].indexOf(target), target.src]);
        })).observe(document.getElementById("images"), { subtree: true, attributes: true, attributeFilter: ["src"] });""")
        generate(page, "一轮弯月", 4, "7")
        # A style is a button.
        wait("an image begins", lambda: page.execute_script("return window.seen.length > 4"))
        shot(page, "rows")
        complete(page, 4)
        shot(page, "generated")
        rows = page.execute_script("""return Promise.all(window.seen.map(async ([number, src]) => {
            const image = new Image(); image.src = src; await image.decode();
            const canvas = document.createElement("canvas"), side = canvas.width = canvas.height = image.naturalWidth;
            const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
            const alpha = [...Array(side).keys()].filter((y) => context.getImageData(0, y, 1, 1).data[3] === 255);
            return [number, alpha.length / side]; }))""")
        for number in range(4):
            own = [share for image, share in rows if image == number]
            assert own == [k / 8 for k in range(1, 9)], own
        src = figures(page, "#images img")[1].get_attribute("src")
        assert base64.b64decode(src.split(",")[1]) == t2i(folder, "一轮弯月", 8), "not the image of vilg t2i"
        # Enlarge it, and caption it.
        figures(page, "#images figure button")[0].click()
        assert find(page, "large").is_displayed()
        shot(page, "large")
        find(page, "look-at").click()
        wait("a caption", lambda: find(page, "caption").text not in ("", "正在看图…"))
        # A file, as if dropped.
        find(page, "file").send_keys(str(SAMPLE))
        wait("a new image", lambda: find(page, "preview").get_attribute("src").endswith(base64.b64encode(SAMPLE.read_bytes()).decode()[-40:]))
        expected = subprocess.run([VILG, "caption", SAMPLE], capture_output=True, text=True, check=True).stdout.strip()
        wait("the caption", lambda: find(page, "caption").text == expected)
        find(page, "texts").send_keys("红苹果\n小狗\n一轮弯月")
        page.find_element(By.CSS_SELECTOR, "#score-form button").click()
        wait("the scores", lambda: len(figures(page, "#scores tr")) == 3)
        shot(page, "captioned")
        # The other language, and a reload: the history is there.
        find(page, "language").click()
        assert find(page, "go").text == "Generate"
        page.refresh()
        ready(page)
        assert find(page, "go").text == "Generate" and len(figures(page, "#history .entry")) == 1
        assert len(figures(page, "#history .entry img")) == 4
        find(page, "language").click()
        # Stopped by the user.
        generate(page, "小狗的脸，扁平风格", 16)
        wait("the first row", lambda: page.execute_script("return document.querySelectorAll('#images img[src]').length > 0"))
        find(page, "stop").click()
        wait("nothing runs", lambda: server.metric("vilg_running_images") == 0 and server.metric("vilg_queue_length") == 0)
        assert not find(page, "generate-message").is_displayed()
        no_complaints(page, server.url)
        two_tabs(page, server)
        hostile_texts(page)
        phone(server)
        server = stop_in_the_middle(page, server)
    finally:
        page.quit()
        if server.process.poll() is None:
            server.stop()


def two_tabs(page, server):
    """Both generate at the same time, and both see the history of both."""
    first = page.current_window_handle
    before = len(figures(page, "#history .entry"))
    page.switch_to.new_window("tab")
    page.get(server.url)
    ready(page)
    second = page.current_window_handle
    generate(page, "红苹果", 4)
    page.switch_to.window(first)
    generate(page, "太阳，立体风格", 4)
    complete(page, 4)
    page.switch_to.window(second)
    complete(page, 4)
    for tab in (second, first):
        page.switch_to.window(tab)
        wait("both are in the history", lambda: len(figures(page, "#history .entry")) == before + 2)
        no_complaints(page, server.url)
    page.switch_to.window(second)
    page.close()
    page.switch_to.window(first)


def hostile_texts(page):
    """Texts stay texts."""
    prompt = '<img src=x onerror="window.hacked=1">月'
    generate(page, prompt, 1)
    complete(page, 1)
    wait("the history has it", lambda: prompt in find(page, "history").text)
    assert page.execute_script("return window.hacked === undefined")


def phone(server):
    page = browser(500, 900)
    try:
        page.set_window_size(500, 900)
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
        page.get(server.url)
        ready(page)
        generate(page, "一辆消防车，复古风格", 4, "1")
        complete(page, 4)
        shot(page, "phone")
        width = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert width[0] <= width[1], f"the page is wider than a phone: {width}"
        no_complaints(page, server.url)
    finally:
        page.quit()


def stop_in_the_middle(page, server):
    """The page says that the server is gone, and goes on when it is there again."""
    generate(page, "小猫，现代风格", 16)
    wait("the first row", lambda: page.execute_script("return document.querySelectorAll('#images img[src]').length > 0"))
    server.process.kill()
    server.process.wait()
    wait("the page sees it", lambda: "down" in find(page, "state").get_attribute("class"))
    assert find(page, "generate-message").is_displayed() and find(page, "go").is_enabled()
    shot(page, "stopped")
    again = Server(port=server.port)
    ready(page)
    generate(page, "小猫，现代风格", 1)
    complete(page, 1)
    assert not find(page, "generate-message").is_displayed()
    return again


def ask_on_the_page(folder):
    """A model that has learnt questions: the page offers them. Its answers are those of a model that has not really."""
    model = Path(folder) / "model"
    subprocess.run([VILG, "export", "-o", str(model), "--model", "demo"], check=True, capture_output=True)
    config = (model / "config.toml").read_text()
    assert "vqa_batch_size = 0" in config
    (model / "config.toml").write_text(config.replace("vqa_batch_size = 0", "vqa_batch_size = 4"))
    (Path(folder) / "token").write_text("a-token-of-enough-length")
    server, page = Server("--model", str(model), "--allow-mismatch", "--matcher", "none", "--token-file", f"{folder}/token"), browser()
    try:
        page.get(server.url)
        wait("the page asks for the token", lambda: find(page, "token").is_displayed())
        shot(page, "token")
        find(page, "token").send_keys("a-token-of-enough-length")
        page.find_element(By.CSS_SELECTOR, "#token-form button").click()
        ready(page)
        assert find(page, "ask-form").is_displayed() and not find(page, "score-form").is_displayed()
        find(page, "file").send_keys(str(SAMPLE))
        wait("the question can be asked", lambda: find(page, "question").is_enabled())
        question = "图中有什么？"
        find(page, "question").send_keys(question)
        page.find_element(By.CSS_SELECTOR, "#ask-form button").click()
        expected = subprocess.run([VILG, "vqa", SAMPLE, question, "--model", model, "--allow-mismatch"], capture_output=True, text=True, check=True)
        wait("the answer", lambda: find(page, "answers").text == f"{question} {expected.stdout.strip()}")
        shot(page, "asked")
    finally:
        page.quit()
        server.stop()


def use_the_client(folder):
    """OpenAI's client, unchanged; and curl."""
    server = Server()
    try:
        client = openai.OpenAI(base_url=server.url + "v1", api_key="unused", max_retries=0)
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").owned_by == "vilg"
        made = client.images.generate(prompt="一轮弯月", n=2, model="demo", response_format="b64_json", extra_body={"seed": 3})
        assert [base64.b64decode(image.b64_json) for image in made.data] == [t2i(folder, "一轮弯月", seed) for seed in (3, 4)]
        assert made.usage.output_tokens == 2 * 64
        big = client.images.generate(prompt="一轮弯月", size="256x256", quality="high", user="x", extra_body={"seed": 3})
        assert struct.unpack(">II", base64.b64decode(big.data[0].b64_json)[16:24]) == (256, 256)
        kinds = [(event.type, getattr(event, "partial_image_index", None)) for event in client.images.generate(
            prompt="一轮弯月", stream=True, partial_images=3, extra_body={"seed": 3})]
        assert kinds == [("image_generation.partial_image", k) for k in range(3)] + [("image_generation.completed", None)], kinds
        for wrong, kind in [({"model": "dall-e-3"}, openai.NotFoundError), ({"n": 99}, openai.BadRequestError), ({"size": "3x4"}, openai.BadRequestError)]:
            try:
                client.images.generate(prompt="月", **wrong)
                raise AssertionError(wrong)
            except kind as error:
                assert error.body["message"], error
        url = server.url + "v1/captions"
        body = Path(folder) / "body.json"
        body.write_text(json.dumps({"image": base64.b64encode(SAMPLE.read_bytes()).decode()}))
        curl = ["curl", "-sS", url, "-H", "Content-Type: application/json", "-d", f"@{body}"]
        expected = subprocess.run([VILG, "caption", SAMPLE], capture_output=True, text=True, check=True).stdout.strip()
        assert json.loads(subprocess.check_output(curl))["data"][0]["caption"] == expected
        assert json.loads(subprocess.check_output(["curl", "-sS", server.url + "healthz"])) == {"status": "ok"}
        openapi = json.loads(subprocess.check_output(["curl", "-sS", server.url + "openapi.json"]))
        assert "/v1/images/generations" in openapi["paths"]
    finally:
        server.stop()


def exchange(server, data, slices=1, pause=0.0, leave=None):
    """Sends bytes, in slices with pauses; reads the whole answer, or leaves after some seconds. Returns the status."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=300) as connection:
        step = max(1, len(data) // slices)
        try:
            for start in range(0, len(data), step):
                connection.sendall(data[start:start + step])
                time.sleep(pause)
        except (BrokenPipeError, ConnectionResetError):
            pass  # The server has answered early; the answer may still be read.
        if leave is not None:
            time.sleep(leave)
            return None
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]


def post(path, body):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, round(share * (len(values) - 1)))]


def load():
    """16 clients at once."""
    server = Server("--queue", "200")
    lock, left, images, problems, kinds = threading.Lock(), iter(range(REQUESTS)), [], [], {}
    image = base64.b64encode(SAMPLE.read_bytes()).decode()
    prompts = ["一轮弯月，扁平风格", "红苹果，立体风格", "小狗的脸", "一辆消防车，复古风格", "太阳"]
    ask = lambda number, **more: json.dumps({"prompt": prompts[number % 5], "seed": number % 20, **more}).encode()

    def one(number, random):
        kind = random.choices(["image", "stream", "caption", "score", "leave", "malformed", "oversized", "slow"], [50, 10, 10, 8, 8, 5, 5, 4])[0]
        begun = time.monotonic()
        if kind == "image":
            status, body = exchange(server, post("/v1/images/generations", ask(number)))
            with lock:
                images.append((number % 100, json.loads(body)["data"][0]["b64_json"], time.monotonic() - begun))
            good = status == 200
        elif kind == "stream":
            status, body = exchange(server, post("/v1/images/generations", ask(number, stream=True, partial_images=8, n=2)))
            good = status == 200 and body.count(b"event: image_generation.completed") == 2
        elif kind == "caption":
            status, body = exchange(server, post("/v1/captions", json.dumps({"image": image}).encode()))
            good = status == 200 and json.loads(body)["data"][0]["caption"]
        elif kind == "score":
            status, body = exchange(server, post("/v1/scores", json.dumps({"image": image, "texts": prompts}).encode()))
            good = status == 200 and len(json.loads(body)["data"]) == 5
        elif kind == "leave":
            exchange(server, post("/v1/images/generations", ask(number, n=8, stream=number % 2 == 0)), leave=random.uniform(0, 1))
            good = True
        elif kind == "malformed":
            data = random.choice([post("/v1/images/generations", b'{"prompt":'), post("/v1/captions", b'{"image":"????"}'), b"GET / HTTP/9\r\n\r\n", post("/v1/scores", b"\xff\xfe")])
            good = exchange(server, data)[0] in (400, 505)
        elif kind == "oversized":
            path, size = random.choice([("/v1/images/generations", 100_000), ("/v1/captions", 14 << 20)])
            good = exchange(server, post(path, b"x" * size))[0] == 413
        else:
            good = exchange(server, post("/v1/images/generations", ask(number)), slices=20, pause=0.1)[0] == 200
        with lock:
            kinds[kind] = kinds.get(kind, 0) + 1
            if not good:
                problems.append((number, kind))

    def client(name):
        choose = random.Random(name)
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            try:
                one(number, choose)
            except Exception as error:
                with lock:
                    problems.append((number, repr(error)))

    try:
        exchange(server, post("/v1/images/generations", ask(0, n=16)))
        clients, memory, begun = [threading.Thread(target=client, args=(name,)) for name in range(CLIENTS)], [], time.monotonic()
        for thread in clients:
            thread.start()
        while any(thread.is_alive() for thread in clients):
            memory.append(server.memory())
            time.sleep(0.25)
        seconds = time.monotonic() - begun
        assert not problems, problems[:10]
        assert sum(kinds.values()) == REQUESTS, (kinds, "an answer is lost")
        wait("nothing is left", lambda: server.metric("vilg_running_images") == 0 and server.metric("vilg_queue_length") == 0)
        # The same prompt and seed gave the same image, in any company.
        first = {}
        assert all(first.setdefault(key, text) == text for key, text, _ in images)
        half, times = len(memory) // 2, [seconds for _, _, seconds in images]
        early, late = max(memory[:half] or memory), max(memory[half:])
        assert late < 1.2 * early + 20, f"memory grows: {early:.0f} MB, then {late:.0f} MB"
        steps, codes = server.metric("vilg_steps_total"), server.metric("vilg_codes_total")
        print(f"{REQUESTS} requests of {CLIENTS} clients in {seconds:.0f} s: {kinds}")
        print(f"memory: at most {early:.0f} MB in the first half, {late:.0f} MB in the second; {codes / steps:.1f} images in a step")
        print(f"one image among them: p50 {percentile(times, 0.5):.2f} s, p95 {percentile(times, 0.95):.2f} s")
    finally:
        server.stop()


def latency():
    """One image of a client that is alone, and of 16 that each ask for one after the other."""
    server = Server()
    body = lambda number: post("/v1/images/generations", json.dumps({"prompt": "一轮弯月，扁平风格", "seed": number}).encode())
    try:
        exchange(server, body(0))
        for clients in (1, 4, 16):
            times = []

            def client():
                for number in range(6):
                    begun = time.monotonic()
                    status, _ = exchange(server, body(number))
                    assert status == 200
                    times.append(time.monotonic() - begun)

            begun, threads = time.monotonic(), [threading.Thread(target=client) for _ in range(clients)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            rate = len(times) / (time.monotonic() - begun)
            print(f"{clients:2} clients: p50 {percentile(times, 0.5):.3f} s, p95 {percentile(times, 0.95):.3f} s, {rate:.1f} images/s")
    finally:
        server.stop()


def main():
    with tempfile.TemporaryDirectory() as folder:
        use_the_page(folder)
        ask_on_the_page(folder)
        use_the_client(folder)
    latency()
    load()
    print("the page, the API and the load of vilg serve work")


if __name__ == "__main__":
    main()
