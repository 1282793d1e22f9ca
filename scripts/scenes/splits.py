"""Splits: held-out combinations of attributes, which record is in which split, and its balanced questions."""

import collections
import random

from scenes import poetry, records
from scenes.records import stable_hash

HELD_OUT = ["heldout_pairs", "heldout_count", "heldout_style", "heldout_colour"]
SPLITS = ["heldout", *HELD_OUT, "heldout_poem", "train"]


def held_out(record):
    """The kinds of held-out combination in a record: none for training."""
    found = set()
    objects = record["objects"]
    for i, one in enumerate(objects):
        name = one["name"]
        if stable_hash(f"style {name} {one['style']}") % 25 == 0:
            found.add("heldout_style")
        if one["count"] > 1 and stable_hash(f"count {name} {one['count']}") % 16 == 0:
            found.add("heldout_count")
        if one["colour"] and stable_hash(f"colour {name} {one['colour']}") % 8 == 0:
            found.add("heldout_colour")
        for other in objects[i + 1 :]:
            if stable_hash("pair " + " ".join(sorted([name, other["name"]]))) % 16 == 0:
                found.add("heldout_pairs")
    return found


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
        held = held_out(record)
        split = "heldout" if not held and stable_hash(seed) % 10 == 0 else held.pop() if len(held) == 1 else "train" if not held else None
        if split and len(by_split[split]) < want[split]:
            add(split, seed, record)
    count = collections.Counter()
    for line in sorted(lines, key=lambda line: stable_hash("order " + line)):
        split = "heldout_poem" if lines[line] else "train"
        if count[split] >= (args.heldout if lines[line] else args.poems):
            continue
        record = poetry.poem_record(random.Random(line), line, aspect)
        if record and not held_out(record):
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
