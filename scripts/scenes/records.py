"""Scene records: what is in an image, the captions and questions drawn from it. No images here, standard library only."""

import collections
import hashlib
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SIZE = 128
STYLES = {"noto": "细腻风格", "twemoji": "扁平风格", "fluent-flat": "简约风格", "fluent-color": "现代风格"}
TIMES = ["清晨", "白天", "黄昏", "夜晚"]
PLACES = ["草地", "雪地", "沙漠", "山间", "花园", "田野", "街道", "海边", "湖面", "海底", "桌上"]
AT = {"草地": "草地上", "雪地": "雪地上", "沙漠": "沙漠里", "山间": "山间", "花园": "花园里", "田野": "田野里", "街道": "街道上",
      "海边": "海边", "湖面": "湖面上", "海底": "海底", "桌上": "桌上"}
SKY = {"圆月": ("1f315", "一轮圆月", ["夜晚"]), "弯月": ("1f319", "一弯新月", ["夜晚"]), "星星": ("2b50", "几颗星星", ["夜晚"]),
       "太阳": ("2600", "一轮太阳", ["清晨", "白天"]), "夕阳": ("2600", "一轮夕阳", ["黄昏"]), "彩虹": ("1f308", "一道彩虹", ["白天"]),
       "白云": ("2601", "一朵白云", ["清晨", "白天", "黄昏"])}
SIDES = {"左边": 23, "中间": 64, "右边": 105}
COUNTS = {1: "一", 2: "两", 3: "三", 4: "四"}
MOST_COVERED = 0.2  # of the smaller of two boxes
OBJECT_SCALE = 1.0  # times the heights of things.tsv, as far as the image allows
DEPTHS = {"近处": (1.2, 118), "中间": (1.0, 104), "远处": (0.75, 90)}
Thing = collections.namedtuple("Thing", "name code kind measure height colours stand places")


def read_things():
    kinds = json.loads((HERE / "kinds.json").read_text(encoding="utf-8"))
    things = {}
    for line in (HERE / "things.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        name, code, kind, measure, height, colours = line.split("\t")
        things[name] = Thing(name, code, kind, measure, int(height), tuple(colours.split()), *kinds[kind])
    return things


THINGS = read_things()


def stable_hash(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---------------------------------------------------------------- records


def place_sky(record):
    """Boxes of the sky, in the upper corners; stars have three small ones beside the large one."""
    for one in record["sky"]:
        left = one["side"] == "左边"
        x = 6 if left else SIZE - 30
        one["boxes"] = [[x, 16 if one["name"] == "夕阳" else 5, 24, 24]]
        for k in range(3 if one["name"] == "星星" else 0):
            one["boxes"].append([x + (26 + 9 * k if left else -12 - 9 * k), 6 + 12 * (k % 2), 10, 10])


def lay_out(rng, record, aspect):
    """Boxes [x, y, width, height]: a group stands in its third of the image (alone: in all of it), nearer is lower and larger,
    and below the sun, moon, stars and clouds above it."""
    place_sky(record)
    alone, closeup = len(record["objects"]) == 1, record["kind"] == "closeup"
    for one in record["objects"]:
        thing = THINGS[one["name"]]
        scale, foot = DEPTHS[one["depth"]]
        count, ratio = one["count"], aspect.get((one["style"], one["name"], one["colour"]), 1.0)
        if closeup:
            height = min(96, 110 / ratio) / (1 if count == 1 else 2.1)
        else:
            height = thing.height * OBJECT_SCALE * scale * rng.uniform(0.94, 1.06) * (0.8 if count > 1 else 1)
        columns = count if count < 4 and (alone or count < 3) else 2
        rows = -(-count // columns)
        height = min(height, (118 if alone else 44) / columns / ratio * 0.95)
        centre, half = SIDES[one["side"]], columns * max(height * ratio * 1.06, 6) / 2
        above = [y + h for s in record["sky"] for x, y, w, h in s["boxes"] if centre - half - 2 < x + w and x < centre + half + 2]
        top = max(above, default=0) + 2
        if closeup:
            middle, lowest = 64, SIZE - 1
        elif thing.stand == "air":
            middle, lowest = 34, 86
        elif thing.stand == "swim":
            middle, lowest = 104 if record["place"] == "湖面" else {"近处": 96, "中间": 70, "远处": 44}[one["depth"]], SIZE - 1
        else:
            middle, lowest = None, foot
        gap = max(2, height * 0.08) if closeup else 2
        height = max(8, int(min(height, (lowest - top - (rows - 1) * gap) / rows)))
        width, block = max(6, round(height * ratio)), rows * height + (rows - 1) * gap
        first = lowest - block if middle is None else max(top, min(middle - block / 2, lowest - block))
        one["size"], one["boxes"] = height, []
        for k in range(count):
            row, column = divmod(k, columns)
            in_row = min(columns, count - row * columns)
            x = centre + (column - (in_row - 1) / 2) * max(width * 1.06, width + 2) - width / 2
            one["boxes"].append([min(max(1, round(x)), SIZE - 1 - width), round(first + row * (height + gap)), width, height])


def covered(a, b):
    """The area that boxes a and b share, as a fraction of the smaller one."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    shared = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
    return shared / min(aw * ah, bw * bh)


def hides(record):
    """The largest `covered` of any two boxes in a record."""
    boxes = [box for one in record["sky"] + record["objects"] for box in one["boxes"]]
    return max((covered(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]), default=0)


def new_object(rng, name, style, count=1, colour=None):
    return {"name": name, "count": count, "side": None, "depth": "中间", "size": 0, "colour": colour, "style": style, "boxes": []}


def random_record(rng, aspect):
    """A scene, an empty scene (5 %) or a close-up on white (12 %)."""
    style = rng.choice(list(STYLES))
    kind = rng.choices(["scene", "empty", "closeup"], [83, 5, 12])[0]
    record = {"kind": kind, "time": None, "place": None, "weather": None, "sky": [], "objects": [], "relations": [], "style": style, "line": None}
    if kind == "closeup":
        names = [rng.choice(list(THINGS))]
    else:
        place = rng.choice(PLACES)
        names = [t.name for t in THINGS.values() if place in t.places and (style, t.name, None) in aspect]
        names = [] if kind == "empty" else rng.sample(names, min(len(names), rng.choice([1, 1, 2, 2, 2, 3, 3])))
        set_scenery(rng, record, rng.choice(TIMES) if place != "海底" else None, place, rng.choice([None] * 4 + ["下雨", "下雪"]))
        choices = [s for s in SKY if record["time"] in SKY[s][2]]
        if place not in ("海底", "桌上") and record["weather"] is None:
            fill_sky(rng, record, rng.sample(choices, min(len(choices), rng.choice([0, 1, 1, 2]))))
    for name in names:
        most = 4 if len(names) < 3 else 2
        colours = [c for c in THINGS[name].colours if (style, name, c) in aspect]
        colour = rng.choice(colours) if colours and rng.random() < 0.6 else None
        record["objects"].append(new_object(rng, name, style, rng.choice([1, 1, *range(1, most + 1)]), colour))
    return finish(rng, record, aspect)


def set_scenery(rng, record, time, place, weather):
    if place in ("海底", "桌上", "沙漠") or (weather == "下雪" and place in ("海边", "花园")):
        weather = None
    record["time"], record["place"], record["weather"] = time, place, weather


def fill_sky(rng, record, names):
    if {"圆月", "弯月"} <= set(names):  # there is one moon
        names = [n for n in names if n != "弯月"]
    record["sky"] = [{"name": n, "side": s, "style": record["style"]} for n, s in zip(names, rng.sample(["左边", "右边"], 2))]


def finish(rng, record, aspect):
    objects = record["objects"]
    if any((o["style"], o["name"], o["colour"]) not in aspect for o in objects):
        return None
    for one, side in zip(objects, rng.sample(list(SIDES), len(objects))):
        # A group that is alone takes the whole width.
        one["side"] = "中间" if record["kind"] == "closeup" or (len(objects) == 1 and one["count"] > 1) else side
        one["depth"] = rng.choice(list(DEPTHS))
    lay_out(rng, record, aspect)
    if hides(record) >= MOST_COVERED:
        return None
    order = list(SIDES)
    if len(objects) == 2:
        a, b = sorted(objects, key=lambda o: order.index(o["side"]))
        record["relations"].append([a["name"], "左边", b["name"]])
        if order.index(b["side"]) - order.index(a["side"]) == 1 and a["depth"] == b["depth"]:
            record["relations"].append([a["name"], "旁边", b["name"]])
        grounded = [o for o in objects if THINGS[o["name"]].stand in ("ground", "float")]
        if len(grounded) == 2 and {a["depth"], b["depth"]} == {"近处", "远处"}:
            near, far = (a, b) if a["depth"] == "近处" else (b, a)
            record["relations"].append([near["name"], "前面", far["name"]])
        flying = [o for o in objects if THINGS[o["name"]].stand == "air"]
        if len(flying) == 1 and len(grounded) == 1 and flying[0]["boxes"][0][1] + flying[0]["boxes"][0][3] < grounded[0]["boxes"][0][1]:
            record["relations"].append([flying[0]["name"], "上面", grounded[0]["name"]])
    return record


# ---------------------------------------------------------------- captions


def phrase(one, counted=True):
    colour = f"{one['colour']}色的" if one["colour"] else ""
    return (COUNTS[one["count"]] + THINGS[one["name"]].measure if counted else "") + colour + one["name"]


def captions(rng, record):
    """The first is the fullest (a poem's is its line)."""
    look, objects = STYLES[record["style"]], record["objects"]
    if record["kind"] == "closeup":
        plain, counted = phrase(objects[0], False), phrase(objects[0])
        if objects[0]["count"] > 1:
            return [f"{counted}，{look}", f"白色背景上的{counted}，{look}", f"{look}的{counted}"]
        return [f"{look}的{plain}", f"一个{look}的{plain}图标", f"{plain}，{look}", f"白色背景上的{plain}，{look}"]
    time = f"{record['time']}的" if record["time"] else ""
    where = time + AT[record["place"]]
    parts = []
    for one in objects:
        stand = THINGS[one["name"]].stand
        verb = {"air": "的空中有", "swim": "游着"}.get(stand, "有")
        parts.append(f"{one['side']}{verb}{phrase(one)}")
    parts += [f"{s['side'][0]}上方有{SKY[s['name']][1]}" for s in record["sky"]]
    parts += ["正在" + record["weather"]] if record["weather"] else []
    full = "，".join([where if objects else f"{time}{record['place']}，没有人和动物", *parts])
    texts = [full, f"{full}，{look}"]
    if objects:
        things = "和".join(phrase(o, False) for o in objects)
        texts += [f"{where}的{things}", f"{look}，{where}有{'、'.join(map(phrase, objects))}"]
        by_name = {o["name"]: o for o in objects}
        for a, relation, b in record["relations"]:
            texts.append(f"{where}，{phrase(by_name[a])}在{phrase(by_name[b])}的{relation}")
    if record["line"]:
        texts = [record["line"], f"{record['line']}，{look}", *texts]
    return list(dict.fromkeys(texts))


# ---------------------------------------------------------------- questions


def questions(rng, record):
    """Candidates [(question, answer, type)]; `balance` keeps some of them."""
    objects, out = record["objects"], []
    if record["kind"] != "closeup":
        out.append(("这是什么地方？", record["place"], "where"))
        if record["time"]:
            out.append(("现在是什么时候？", record["time"], "when"))
        if record["sky"]:
            out.append(("天上有什么？", "和".join(s["name"] for s in record["sky"]), "what"))
        absent = rng.choice(list(THINGS))
        if all(o["name"] != absent for o in objects):
            out.append((f"图里有{absent}吗？", "没有", "yes-no"))
    for one in objects:
        name = one["name"]
        out.append((f"图里有几{THINGS[name].measure}{name}？", COUNTS[one["count"]] + THINGS[name].measure, "how many"))
        if one["colour"]:
            out.append((f"{name}是什么颜色的？", one["colour"] + "色", "which colour"))
        if record["kind"] != "closeup":
            out.append((f"{name}在哪边？", one["side"], "where"))
            out.append((f"图里有{name}吗？", "有，在" + one["side"], "yes-no"))
            out.append((f"{one['side']}有什么？", name, "what"))
        else:
            out.append(("图里是什么？", name, "what"))
    for a, relation, b in record["relations"]:
        if relation in ("前面", "上面"):
            out.append((f"{b}的{relation}是什么？", a, "what"))
    return out


def balance(candidates, most=0.4):
    """Indexes of the questions to keep, so that no answer makes more than `most` of those with the same question."""
    groups = collections.defaultdict(lambda: collections.defaultdict(list))
    for index, (question, answer, _) in enumerate(candidates):
        groups[question][answer].append(index)
    keep = set()
    for question, answers in groups.items():
        largest = max(map(len, answers.values()))
        for cap in range(largest, 0, -1):
            if cap <= most * sum(min(cap, len(a)) for a in answers.values()):
                for answer, indexes in answers.items():
                    indexes = sorted(indexes, key=lambda i: stable_hash(f"{i}{question}"))
                    keep.update(indexes[:cap])
                break
    return keep
