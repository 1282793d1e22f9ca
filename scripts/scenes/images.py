"""Images of records: sprites rasterised from emoji drawings, recoloured and pasted on drawn backgrounds."""

import collections
import colorsys
import functools
import io
import random

import build_emoji as emoji
from PIL import Image, ImageDraw
from scenes import records
from scenes.records import SIZE, SKY, THINGS

SKIES = {"清晨": ((255, 220, 180), (160, 205, 240)), "白天": ((205, 233, 255), (95, 175, 240)),
         "黄昏": ((255, 172, 96), (150, 92, 140)), "夜晚": ((58, 68, 118), (14, 20, 52))}
LIGHT = {"清晨": 0.95, "白天": 1.0, "黄昏": 0.85, "夜晚": 0.55}
GROUNDS = {"草地": (124, 190, 84), "雪地": (238, 243, 250), "沙漠": (228, 192, 122), "山间": (112, 150, 96), "花园": (150, 205, 112),
           "田野": (214, 190, 90), "街道": (128, 130, 136), "海边": (238, 218, 168), "湖面": (74, 136, 196), "海底": (214, 196, 140)}
HUES = {"红": 0, "黄": 50, "绿": 120, "蓝": 218, "紫": 280}
HORIZON = 64
SPRITES = {}


# ---------------------------------------------------------------- sprites


def recolour(figure, colour):
    """The sprite with its main colour changed; None where that colours less than a third of it."""
    pixels = list(zip(*[iter(figure.tobytes())] * 4))
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
    result = Image.new("RGBA", figure.size)
    result.putdata(out)
    return result


def make_sprites(job):
    """[((style, name, colour), sprite)] of one drawing."""
    style, drawing, names = job
    figure = emoji.rasterise(drawing, 112).convert("RGBA")
    figure = figure.crop(figure.getchannel("A").getbbox())
    found = []
    for name, colours in names:
        found.append(((style, name, None), figure))
        found += [((style, name, colour), changed) for colour in colours if (changed := recolour(figure, colour))]
    return found


def load_sprites(cache, pool):
    """Fills SPRITES by (style, name, colour); the sky's are (style, name, None)."""
    by_name = emoji.icon_keys(cache)
    wanted = collections.defaultdict(list)
    for name, thing in THINGS.items():
        wanted[thing.code].append((name, thing.colours))
    for name, (code, *_) in SKY.items():
        wanted[code].append((name, ()))
    jobs = [(style, drawing, wanted[key]) for style in records.STYLES for key, drawing in emoji.load_style(style, cache, by_name) if key in wanted]
    for found in pool.map(make_sprites, jobs, chunksize=8):
        SPRITES.update(found)


def aspects():
    return {key: figure.width / figure.height for key, figure in SPRITES.items()}


@functools.lru_cache(20000)
def sprite(style, name, colour, width, height):
    return SPRITES[style, name, colour].resize((width, height), Image.LANCZOS)


def lit(figure, light):
    if light >= 1:
        return figure
    dark = figure.convert("RGB").point(lambda c: round(c * light))
    dark.putalpha(figure.getchannel("A"))
    return dark


# ---------------------------------------------------------------- images


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
    for one in record["sky"]:  # before the mountains and houses, which are low enough to leave it visible
        for x, y, w, h in one["boxes"]:
            figure = sprite(one["style"], one["name"], None, w * 2, h * 2)
            image.paste(figure, (x * 2, y * 2), figure)
    far = blend(low, ground, 0.5)
    tallest = 60 if record["sky"] else 96
    if place == "山间":
        for _ in range(4):
            x, h, w = rng.randint(-10, 260), min(tallest, rng.randint(50, 96)), rng.randint(56, 90)
            d.polygon([(x - w, line), (x, line - h), (x + w, line)], fill=blend(far, low, rng.random() * 0.3))
            d.polygon([(x - w * 0.25, line - h * 0.75), (x, line - h), (x + w * 0.25, line - h * 0.75)], fill=tuple(round(c * light) for c in (240, 244, 250)))
    elif place == "街道":
        x = -6
        while x < 256:
            w, h = rng.randint(24, 44), min(tallest, rng.randint(26, 70))
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
    """An image 256 pixels wide with a row of each colour."""
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
            figure = lit(sprite(one["style"], one["name"], one["colour"], w, h), 1.0 if one["name"] in ("灯笼", "蜡烛") else light)
            if stand == "float" and not closeup:
                mirror = figure.transpose(Image.FLIP_TOP_BOTTOM).crop((0, 0, w, h // 2))
                image.paste(mirror, (x, y + h - 2), mirror.getchannel("A").point(lambda a: a * 3 // 10))
            mask = figure.getchannel("A")
            if stand == "swim" and record["place"] == "湖面":
                mask = mask.point(lambda a: a * 4 // 5)
            image.paste(figure, (x, y), mask)
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
