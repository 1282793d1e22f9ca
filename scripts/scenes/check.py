"""Verifies a build of scenes. Standard library only."""

import collections
import hashlib
import json
import tarfile

from scenes.poetry import is_simplified
from scenes.records import MOST_COVERED, SIZE, hides
from scenes.splits import HELD_OUT, SPLITS, held_out


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


def answers(questions):
    """How often each question text has each answer."""
    found = collections.defaultdict(collections.Counter)
    for question, answer, _ in questions:
        found[question][answer] += 1
    return found


def baseline(questions, learnt):
    """Accuracy by type of the most frequent answer to each question text in `learnt`: what can be guessed without the image."""
    right, total = collections.Counter(), collections.Counter()
    for question, answer, kind in questions:
        total[kind] += 1
        best = learnt.get(question)
        right[kind] += bool(best) and best.most_common(1)[0][0] == answer
    return {kind: round(right[kind] / total[kind], 3) for kind in sorted(total)}


def record_faults(split, record):
    """Yields the causes of what is wrong in one record."""
    if split == "train" and held_out(record):
        yield "held-out combination in train"
    if split in HELD_OUT and split not in held_out(record):
        yield "no held-out combination"
    for one in record["objects"]:
        if len(one["boxes"]) != one["count"]:
            yield "count"
    for one in record["objects"] + record["sky"]:
        for x, y, w, h in one["boxes"]:
            if x < 0 or y < 0 or x + w > SIZE or y + h > SIZE or w < 1 or h < 1:
                yield "box outside"
    if hides(record) >= MOST_COVERED:
        yield "covered"
    boxes = {o["name"]: o["boxes"] for o in record["objects"]}
    for a, relation, b in record["relations"]:
        (ax, ay, aw, ah), (bx, by, bw, bh) = boxes[a][0], boxes[b][0]
        true = {"左边": ax + aw / 2 < bx + bw / 2, "前面": boxes[a][-1][1] + ah > boxes[b][-1][1] + bh, "上面": ay + ah < by, "旁边": True}
        if not true[relation]:
            yield "relation"
    if sum(s["name"] in ("圆月", "弯月") for s in record["sky"]) > 1:
        yield "two moons"
    if record["time"] == "夜晚" and any(s["name"] in ("太阳", "夕阳") for s in record["sky"]):
        yield "sun at night"
    if record["line"] and not is_simplified(record["line"].replace("，", "")):
        yield "not simplified"


def find_faults(samples):
    """(Counter of faults by cause, questions by split) of samples (split, PNG, JSON)."""
    seen, faults, asked = {}, collections.Counter(), {split: [] for split in SPLITS}
    for split, png, meta in samples:
        for item in [hashlib.sha256(png).hexdigest(), *meta["captions"]]:
            faults["in two splits"] += seen.setdefault(item, split) != split
        faults.update(record_faults(split, meta["scene"]))
        asked[split] += [(q["question"], q["answer"], q["type"]) for q in meta["questions"]]
    for questions in asked.values():
        faults["unbalanced question"] += sum(max(c.values()) > 0.4 * sum(c.values()) for c in answers(questions).values())
    return {cause: count for cause, count in faults.items() if count}, asked


def check(out):
    """Prints what a build holds; 1 if it does not keep its promises, 0 if it does."""
    counts = collections.Counter()

    def samples():
        for split in SPLITS:
            for png, meta in read_split(out / split):
                counts[split] += 1
                counts[split, "poems"] += bool(meta["scene"]["line"])
                yield split, png, meta

    faults, asked = find_faults(samples())
    learnt = answers(asked["train"])
    for split in SPLITS:
        print(f"{split}: {counts[split]} samples, {counts[split, 'poems']} of them poems, {len(asked[split])} questions")
        print(f"  majority answer of {split}: {baseline(asked[split], answers(asked[split]))}")
        if split != "train":
            print(f"  majority answer of train: {baseline(asked[split], learnt)}")
    print("faults:", faults or "none")
    return 1 if faults else 0
