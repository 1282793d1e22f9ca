#!/usr/bin/env python3
"""Build pictures of scenes with Chinese captions, lines of poetry and questions.

Pictures  openly licensed emoji drawings (STYLES of scenes/records.py) on drawn backgrounds
Text      drawn from the record of a scene; lines of poetry from npm chinese-poetry
Output    WebDataset shards as build_emoji.py writes them, in OUT/{train,heldout,heldout_*}, beside OUT/ATTRIBUTION.md
          and OUT/dataset_stats.json

Needs npm, Pillow, resvg_py and OpenCC; scripts/build_scenes.sh provides them. Every choice follows from a hash, so two
builds give the same bytes. `--check DIR` verifies a build, `--sheet PNG` draws 24 scenes of one.
"""

import argparse
import collections
import colorsys
import functools
import hashlib
import io
import json
import os
import random
import shutil
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import build_emoji as emoji
from PIL import Image, ImageDraw
from scenes import records
from scenes.records import SIZE, SKY, THINGS, stable_hash

emoji.PACKAGES["chinese-poetry"] = "2.0.1"
HELD_OUT = ["heldout_pairs", "heldout_count", "heldout_style", "heldout_colour"]
SPLITS = ["heldout", *HELD_OUT, "heldout_poem", "train"]
SKIES = {"清晨": ((255, 220, 180), (160, 205, 240)), "白天": ((205, 233, 255), (95, 175, 240)),
         "黄昏": ((255, 172, 96), (150, 92, 140)), "夜晚": ((58, 68, 118), (14, 20, 52))}
LIGHT = {"清晨": 0.95, "白天": 1.0, "黄昏": 0.85, "夜晚": 0.55}
GROUNDS = {"草地": (124, 190, 84), "雪地": (238, 243, 250), "沙漠": (228, 192, 122), "山间": (112, 150, 96), "花园": (150, 205, 112),
           "田野": (214, 190, 90), "街道": (128, 130, 136), "海边": (238, 218, 168), "湖面": (74, 136, 196), "海底": (214, 196, 140)}
HUES = {"红": 0, "黄": 50, "绿": 120, "蓝": 218, "紫": 280}
HORIZON = 64
SPRITES = {}

# ---------------------------------------------------------------- sprites


def recolour(picture, colour):
    """The sprite with its main colour changed; None where that colours less than a third of it."""
    pixels = list(zip(*[iter(picture.tobytes())] * 4))
    solid = [p for p in pixels if p[3] > 128]
    weights = collections.Counter()
    for r, g, b, _ in solid:
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        if s > 0.25 and v > 0.2:
            weights[int(h * 24)] += s
    if not weights:
        return None
    main, out, changed = max(weights, key=lambda h: (weights[h], h)), [], 0
    for r, g, b, a in pixels:
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        away = abs(h * 24 - main - 0.5)
        if a and s > 0.2 and min(away, 24 - away) < 2.5:
            if colour == "白":
                s, v = s * 0.08, 0.75 + 0.25 * v
            elif colour == "黑":
                s, v = s * 0.2, v * 0.3
            else:
                h, s, v = HUES[colour] / 360, max(s, 0.72), max(v, 0.85 if colour == "黄" else 0.3)
            r, g, b = (round(c * 255) for c in colorsys.hsv_to_rgb(h, s, v))
            changed += a > 128
        out.append((r, g, b, a))
    if changed < len(solid) / 3:
        return None
    result = Image.new("RGBA", picture.size)
    result.putdata(out)
    return result


def load_sprites(cache):
    """Fills SPRITES by (style, name, colour); the sky's are (style, name, None)."""
    by_name = emoji.icon_keys(cache)
    wanted = collections.defaultdict(list)
    for name, thing in THINGS.items():
        wanted[thing.code].append((name, thing.colours))
    for name, (code, *_) in SKY.items():
        wanted[code].append((name, ()))
    for style in records.STYLES:
        for key, drawing in emoji.load_style(style, cache, by_name):
            for name, colours in wanted.get(key, ()):
                picture = emoji.rasterise(drawing, 112).convert("RGBA")
                picture = picture.crop(picture.getchannel("A").getbbox())
                SPRITES[style, name, None] = picture
                for colour in colours:
                    if changed := recolour(picture, colour):
                        SPRITES[style, name, colour] = changed


def aspects():
    return {key: picture.width / picture.height for key, picture in SPRITES.items()}


@functools.lru_cache(20000)
def sprite(style, name, colour, width, height):
    return SPRITES[style, name, colour].resize((width, height), Image.LANCZOS)


def lit(picture, light):
    if light >= 1:
        return picture
    dark = picture.convert("RGB").point(lambda c: round(c * light))
    dark.putalpha(picture.getchannel("A"))
    return dark


# ---------------------------------------------------------------- pictures


def background(rng, record):
    place, time = record["place"], record["time"] or "白天"
    light = LIGHT[time]
    image = Image.new("RGB", (SIZE * 2, SIZE * 2))
    d = ImageDraw.Draw(image)
    low, high = SKIES[time]
    if place == "桌上":
        wall = tuple(round(c * (0.5 + light / 2)) for c in rng.choice([(244, 232, 214), (222, 232, 236), (236, 226, 236)]))
        d.rectangle([0, 0, 256, 256], fill=wall)
        d.rectangle([150, 14, 236, 84], fill=(250, 250, 250))
        for y in range(20, 79):
            d.line([(156, y), (230, y)], fill=blend(high, low, (y - 20) / 59))
        d.line([(193, 14), (193, 84)], fill=(250, 250, 250), width=4)
        wood = rng.choice([(172, 118, 70), (196, 148, 96), (140, 96, 66)])
        image.paste(bands([tuple(round(c * (0.86 + (y - 150) / 700)) for c in wood) for y in range(150, 256)]), (0, 150))
        return image.reduce(2)
    if place == "海底":
        image.paste(bands([blend((92, 190, 226), (16, 72, 132), y / 256) for y in range(256)]))
        d.polygon([(0, 256), (0, 206), (70, 196), (150, 208), (256, 194), (256, 256)], fill=(206, 190, 140))
        for _ in range(8):
            x, y, r = rng.randint(0, 250), rng.randint(10, 190), rng.randint(2, 5)
            d.ellipse([x, y, x + r, y + r], outline=(190, 230, 245))
        return image.reduce(2)
    if record["weather"]:
        low, high = blend(low, (150, 156, 166), 0.55 * light), blend(high, (130, 138, 150), 0.55 * light)
    ground = tuple(round(c * light) for c in GROUNDS[place])
    if record["weather"] == "下雪":
        ground = blend(ground, tuple(round(c * light) for c in (238, 243, 250)), 0.5)
    line = HORIZON * 2
    sky = [blend(high, low, y / line) for y in range(line)]
    image.paste(bands(sky + [tuple(min(255, round(c * (1.06 - 0.2 * y / line))) for c in ground) for y in range(line)]))
    far = blend(low, ground, 0.5)
    if place == "山间":
        for _ in range(4):
            x, h, w = rng.randint(-10, 260), rng.randint(56, 96), rng.randint(56, 90)
            d.polygon([(x - w, line), (x, line - h), (x + w, line)], fill=blend(far, low, rng.random() * 0.3))
            d.polygon([(x - w * 0.25, line - h * 0.75), (x, line - h), (x + w * 0.25, line - h * 0.75)], fill=tuple(round(c * light) for c in (240, 244, 250)))
    elif place == "街道":
        x = -6
        while x < 256:
            w, h = rng.randint(24, 44), rng.randint(26, 70)
            d.rectangle([x, line - h, x + w, line], fill=blend(far, (90, 96, 120), 0.4 + rng.random() * 0.2))
            for wx in range(x + 5, x + w - 6, 10):
                for wy in range(line - h + 6, line - 8, 12):
                    d.rectangle([wx, wy, wx + 4, wy + 5], fill=(255, 226, 130) if time == "夜晚" and rng.random() < 0.7 else blend(low, (255, 255, 255), 0.3))
            x += w + 3
        for x in range(-10, 256, 52):
            d.polygon([(x, 196), (x + 28, 196), (x + 24, 202), (x - 4, 202)], fill=tuple(round(c * light) for c in (236, 236, 230)))
    elif place == "海边":
        d.rectangle([0, line - 22, 256, line + 6], fill=tuple(round(c * light) for c in (64, 140, 200)))
        d.line([(0, line + 7), (256, line + 7)], fill=tuple(round(c * light) for c in (240, 248, 250)), width=3)
    elif place == "湖面":
        green = tuple(round(c * light) for c in (92, 146, 92))
        for _ in range(9):
            x, w = rng.randint(-20, 256), rng.randint(30, 70)
            d.pieslice([x, line - 12 - w // 5, x + w, line + 12 + w // 5], 180, 360, fill=green)
        for _ in range(18):
            x, y = rng.randint(0, 256), rng.randint(line + 8, 254)
            d.line([(x, y), (x + rng.randint(12, 36), y)], fill=tuple(min(255, c + 26) for c in ground), width=2)
    else:
        for _ in range(3):
            x, w, h = rng.randint(-60, 220), rng.randint(100, 200), rng.randint(8, 24)
            d.pieslice([x, line - h, x + w, line + h], 180, 360, fill=blend(far, ground, 0.4))
        dots = {"花园": [(230, 90, 120), (250, 220, 90), (250, 250, 250)], "田野": [(176, 150, 60)], "草地": [(96, 160, 66)]}.get(place, [])
        for _ in range(50 if dots else 0):
            x, y = rng.randint(0, 255), rng.randint(line + 8, 252)
            fill = tuple(round(c * light) for c in rng.choice(dots))
            d.ellipse([x, y, x + 3, y + 3], fill=fill) if place == "花园" else d.line([(x, y), (x + 1, y + 6)], fill=fill, width=2)
    return image.reduce(2)


def bands(colours):
    """A picture 256 pixels wide with a row of each colour."""
    column = Image.new("RGB", (1, len(colours)))
    column.putdata(colours)
    return column.resize((256, len(colours)), Image.NEAREST)


def blend(a, b, t):
    t = min(1, max(0, t))
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b))


def draw(rng, record):
    closeup = record["kind"] == "closeup"
    image = Image.new("RGB", (SIZE, SIZE), "white") if closeup else background(rng, record)
    light = 1.0 if closeup else {"夜晚": 0.82, "黄昏": 0.94}.get(record["time"], 1.0)
    for one in record["sky"]:
        x, y, w, h = one["boxes"][0]
        picture = sprite(one["style"], one["name"], None, w, h)
        image.paste(picture, (x, y), picture)
        for k in range(3 if one["name"] == "星星" else 0):
            small = sprite(one["style"], one["name"], None, 10, 10)
            image.paste(small, (x + (26 + 9 * k if x < 64 else -12 - 9 * k), 6 + 12 * (k % 2)), small)
    shade = Image.new("L", image.size)
    pen = ImageDraw.Draw(shade)
    objects = sorted(record["objects"], key=lambda o: list(records.DEPTHS).index(o["depth"]), reverse=True)
    for one in objects if not closeup else []:
        if THINGS[one["name"]].stand == "ground":
            for x, y, w, h in one["boxes"]:
                pen.ellipse([x + w * 0.06, y + h - max(2, w * 0.09), x + w * 0.94, y + h + max(2, w * 0.07)], fill=80)
    image.paste((20, 20, 40), (0, 0), shade)
    for one in objects:
        stand = THINGS[one["name"]].stand
        for x, y, w, h in one["boxes"]:
            picture = lit(sprite(one["style"], one["name"], one["colour"], w, h), 1.0 if one["name"] in ("灯笼", "蜡烛") else light)
            if stand == "float" and not closeup:
                mirror = picture.transpose(Image.FLIP_TOP_BOTTOM).crop((0, 0, w, h // 2))
                image.paste(mirror, (x, y + h - 2), mirror.getchannel("A").point(lambda a: a * 3 // 10))
            mask = picture.getchannel("A")
            if stand == "swim" and record["place"] == "湖面":
                mask = mask.point(lambda a: a * 4 // 5)
            image.paste(picture, (x, y), mask)
    pen = ImageDraw.Draw(image)
    for _ in range(70 if record["weather"] else 0):
        x, y = rng.randint(0, SIZE), rng.randint(0, SIZE)
        if record["weather"] == "下雪":
            pen.ellipse([x, y, x + 2, y + 2], fill="white")
        else:
            pen.line([(x, y), (x - 2, y + 6)], fill=(196, 210, 230))
    return image


def render(job):
    seed, record = job
    out = io.BytesIO()
    draw(random.Random(f"draw {seed}"), record).save(out, "PNG")
    return out.getvalue()


# ---------------------------------------------------------------- poetry


def couplets(path):
    """Pairs of lines of five or seven characters in simplified script."""
    import opencc

    simplify, pairs = opencc.OpenCC("t2s").convert, []
    for poem in emoji.read_json(path):
        for text in poem.get("paragraphs") or []:
            for sentence in simplify(text).replace("！", "。").replace("？", "。").split("。"):
                lines = sentence.strip().split("，")
                if len(lines) == 2 and len(lines[0]) == len(lines[1]) and len(lines[0]) in (5, 7):
                    if all("一" <= c <= "鿿" for c in "".join(lines)) and any(map(is_named, [*lines, sentence])):
                        pairs.append(tuple(lines))
    return pairs


def is_named(text):
    return records.is_drawable(records.meanings(text))


def poem_lines(cache, pool):
    """{line or couplet: whether it is held out}. A couplet and its lines are on one side."""
    folder = emoji.fetch("chinese-poetry", cache) / "dist"
    files = sorted((folder / "quantangshi").glob("poet*.json"))
    lines, side = {}, {}
    for found in pool.map(couplets, files, chunksize=4):
        for a, b in found:
            held = stable_hash(f"poem {a}{b}") % 20 == 0
            if side.get(a, held) != held or side.get(b, held) != held:
                continue
            side[a] = side[b] = held
            for text in (a, b, f"{a}，{b}"):
                if is_named(text):
                    lines[text] = held
    return lines


# ---------------------------------------------------------------- build


def plan(args, lines, aspect):
    """Records by split. No record of another split repeats a caption; train has no held-out combination."""
    want = {split: args.heldout for split in SPLITS} | {"train": args.scenes}
    by_split, used, drops = {split: [] for split in SPLITS}, {}, collections.Counter()

    def add(split, seed, record):
        texts = [t for t in records.captions(random.Random(f"words {seed}"), record) if used.get(t, split) == split]
        if not texts or record["line"] and texts[0] != record["line"] or not record["line"] and len(texts) < 2:
            drops["caption of another split"] += 1
            return
        used.update(dict.fromkeys(texts, split))
        by_split[split].append((seed, record, texts))

    index = 0
    while any(len(by_split[s]) < want[s] for s in SPLITS if s != "heldout_poem") and index < 100 * (args.scenes + args.heldout * 6):
        seed = f"scene {index}"
        index += 1
        if (record := records.random_record(random.Random(seed), aspect)) is None:
            continue
        held = records.held_out(record)
        split = "heldout" if not held and stable_hash(seed) % 10 == 0 else held.pop() if len(held) == 1 else "train" if not held else None
        if split and len(by_split[split]) < want[split]:
            add(split, seed, record)
    count = collections.Counter()
    for line in sorted(lines, key=lambda line: stable_hash("order " + line)):
        split = "heldout_poem" if lines[line] else "train"
        if count[split] >= (args.heldout if lines[line] else args.poems):
            continue
        record = records.poem_record(random.Random(line), line, aspect)
        if record and not records.held_out(record):
            before = len(by_split[split])
            add(split, line, record)
            count[split] += len(by_split[split]) - before
    return by_split, count, drops


def ask(rows):
    """Balanced questions of a split, a list for each row."""
    candidates, owner = [], []
    for row, (seed, record, _) in enumerate(rows):
        for candidate in records.questions(random.Random(f"ask {seed}"), record):
            candidates.append(candidate)
            owner.append(row)
    asked = [[] for _ in rows]
    for index in sorted(records.balance(candidates)):
        question, answer, kind = candidates[index]
        asked[owner[index]].append({"question": question, "answer": answer, "type": kind})
    return asked


def build(out, cache, args):
    began = time.time()
    load_sprites(cache)
    aspect = aspects()
    summary = {"things": len({n for _, n, _ in aspect} & set(THINGS)), "splits": {}}
    digests = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        lines = poem_lines(cache, pool) if args.poems else {}
        summary["lines found"] = len(lines)
        print(f"{time.time() - began:.0f} s: {len(aspect)} sprites, {len(lines)} lines", flush=True)
        by_split, count, drops = plan(args, lines, aspect)
        print(f"{time.time() - began:.0f} s: records, {dict(count)} poems", flush=True)
        for split in SPLITS:
            rows = sorted(by_split[split], key=lambda row: stable_hash("shuffle " + row[0]))
            shards, asked = emoji.Shards(out / split, args.shard_size), ask(rows)
            for (_, record, texts), questions, png in zip(rows, asked, pool.map(render, [r[:2] for r in rows], chunksize=64)):
                digest = hashlib.sha256(png).hexdigest()
                if digests.setdefault(digest, split) != split:
                    drops["picture of another split"] += 1
                    continue
                shards.add(png, texts[0], {"caption": texts[0], "captions": texts, "scene": record, "questions": questions, "split": split,
                           "width": SIZE, "height": SIZE, "sha256": digest, "status": "success"})
            shards.close()
            summary["splits"][split] = shards.count
            print(f"{time.time() - began:.0f} s: {split} {shards.count}", flush=True)
    return summary | {"poems": dict(count), "dropped": dict(drops)}


def attribution():
    lines = ["# Sources", "", "Drawings were rasterised, scaled, recoloured and composed into scenes.", ""]
    for style in records.STYLES:
        package, _, license, author = emoji.STYLES[style]
        lines.append(f"- {style}: {author} — {license} — npm {package}@{emoji.PACKAGES[package]}")
    lines.append(f"- poetry: chinese-poetry contributors — MIT — npm chinese-poetry@{emoji.PACKAGES['chinese-poetry']}; simplified with OpenCC (Apache-2.0)")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- check


def read_split(folder):
    """Yields (PNG, the sample's JSON)."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            png = None
            for member in archive:
                content = archive.extractfile(member).read()
                if member.name.endswith(".png"):
                    png = content
                elif member.name.endswith(".json"):
                    yield png, json.loads(content)


def baseline(questions, answers):
    """Accuracy by type of the most frequent answer to each question; `answers` counts them where it is learnt."""
    right, total = collections.Counter(), collections.Counter()
    for question, answer, kind in questions:
        total[kind] += 1
        best = answers.get(question)
        right[kind] += bool(best) and best.most_common(1)[0][0] == answer
    return {kind: round(right[kind] / total[kind], 3) for kind in sorted(total)}


def check(out):
    """Exits with an error unless the build keeps its promises."""
    seen, faults, asked = {}, collections.Counter(), {}
    for split in SPLITS:
        asked[split] = []
        for png, meta in read_split(out / split):
            record = meta["scene"]
            for item in [hashlib.sha256(png).hexdigest(), *meta["captions"]]:
                faults["in two splits"] += seen.setdefault(item, split) != split
            faults["held-out combination in train"] += split == "train" and bool(records.held_out(record))
            faults["no held-out combination"] += split in HELD_OUT and split not in records.held_out(record)
            for one in record["objects"]:
                faults["count"] += len(one["boxes"]) != one["count"]
                for x, y, w, h in one["boxes"]:
                    faults["box outside"] += x < 0 or y < 0 or x + w > SIZE or y + h > SIZE or w < 1 or h < 1
            boxes = {o["name"]: o["boxes"] for o in record["objects"]}
            for a, relation, b in record["relations"]:
                (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[a][0], boxes[b][0]
                true = {"左边": ax + aw / 2 < bx + bw / 2, "前面": boxes[a][-1][1] + ah > boxes[b][-1][1] + bh, "上面": ay + ah < by, "旁边": True}
                faults["relation"] += not true[relation]
            faults["two moons"] += sum(s["name"] in ("圆月", "弯月") for s in record["sky"]) > 1
            faults["sun at night"] += record["time"] == "夜晚" and any(s["name"] in ("太阳", "夕阳") for s in record["sky"])
            asked[split] += [(q["question"], q["answer"], q["type"]) for q in meta["questions"]]
    learnt = collections.defaultdict(collections.Counter)
    for question, answer, _ in asked["train"]:
        learnt[question][answer] += 1
    for split in SPLITS:
        own = collections.defaultdict(collections.Counter)
        for question, answer, _ in asked[split]:
            own[question][answer] += 1
        faults["unbalanced question"] += sum(max(c.values()) > 0.4 * sum(c.values()) for c in own.values())
        print(f"{split}: {len(asked[split])} questions; majority answer {baseline(asked[split], own)}; train's {baseline(asked[split], learnt)}")
    faults = {cause: count for cause, count in faults.items() if count}
    print("faults:", faults or "none")
    sys.exit(1 if faults else 0)


def sheet(out, path):
    """24 scenes in a picture, with their captions on standard output."""
    image = Image.new("RGB", (6 * 132 + 4, 4 * 132 + 4), "white")
    for k, (png, meta) in enumerate(row for row, _ in zip(read_split(out / "train"), range(24))):
        image.paste(Image.open(io.BytesIO(png)), (4 + k % 6 * 132, 4 + k // 6 * 132))
        print(k // 6 + 1, k % 6 + 1, meta["captions"][:3])
    image.quantize(255).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), help="folder to make (default: data/scenes)")
    parser.add_argument("--cache", type=Path, default=Path("data/emoji.npm"), help="folder of downloaded packages (default: data/emoji.npm)")
    parser.add_argument("--scenes", type=int, default=30000, help="training scenes without poems (default: 30000)")
    parser.add_argument("--poems", type=int, default=21000, help="training lines of poetry (default: 21000; 0: none)")
    parser.add_argument("--heldout", type=int, default=600, help="samples of each held-out split (default: 600)")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples a shard (default: 1000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--check", type=Path, metavar="DIR", help="verify a build instead")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw 24 scenes of --out instead")
    args = parser.parse_args()
    if args.check:
        check(args.check)
    if args.sheet:
        return sheet(args.out, args.sheet)
    if args.out.exists():
        parser.error(f"{args.out} exists; remove it to build it again")
    cache = args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    summary = build(part, cache, args)
    (part / "dataset_stats.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")
    (part / "ATTRIBUTION.md").write_text(attribution(), encoding="utf-8")
    part.rename(args.out)
    print(json.dumps({"out": str(args.out), **summary}, ensure_ascii=False))


if __name__ == "__main__":
    main()
