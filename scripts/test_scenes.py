#!/usr/bin/env python3
"""Tests of build_scenes.py on records and a tiny build without images; no network, no packages: python3 scripts/test_scenes.py"""

import argparse
import contextlib
import copy
import io
import json
import random
import tarfile
import tempfile
import unittest
import unittest.mock
from pathlib import Path

from scenes import check, poetry, records, splits

ASPECT = {(style, name, colour): 1.0 for style in records.STYLES for name, thing in records.THINGS.items() for colour in (None, *thing.colours)}
RECORDS = [records.random_record(random.Random(f"test {i}"), ASPECT) for i in range(3000)]
LINES = {"明月松间照": False, "孤帆带夕阳": False, "白马饰金羁": False, "鱼戏莲叶间": True, "古道西风瘦马": False}


def tiny_build():
    """[(split, image, JSON)] of a build whose images are the text of their records."""
    lines = {line: held for line, held in LINES.items() if poetry.is_drawable(poetry.meanings(line))}
    by_split, count, _ = splits.plan(argparse.Namespace(scenes=1500, heldout=60, poems=9), lines, ASPECT)
    assert count["train"] and count["heldout_poem"], count
    samples = []
    for split, rows in by_split.items():
        for (_, record, texts), asked in zip(rows, splits.ask(rows)):
            samples.append((split, json.dumps(record, ensure_ascii=False).encode(), {"captions": texts, "scene": record, "questions": asked}))
    return samples


SAMPLES = tiny_build()


class Scenes(unittest.TestCase):
    def test_lexicon_names_only_what_can_be_drawn(self):
        known = {"thing": records.THINGS, "sky": records.SKY, "time": records.TIMES, "place": records.PLACES, "weather": ["下雪", "下雨"]}
        for word, meaning in poetry.LEXICON.items():
            if meaning != "-":
                kind, name = meaning.split(":")
                self.assertIn(name, known[kind], word)
        self.assertGreaterEqual(len(records.THINGS), 150)

    def test_larger_things_hide_each_other_no_more(self):
        def sizes(scale):
            with unittest.mock.patch.object(records, "OBJECT_SCALE", scale):
                found = [records.random_record(random.Random(f"scale {i}"), ASPECT) for i in range(1000)]
            kept = [record for record in found if record]
            self.assertGreater(len(kept), 950)
            for record in kept:
                self.assertEqual([fault for fault in check.record_faults("", record)], [])
            return [one["size"] for record in kept for one in record["objects"] if record["kind"] == "scene"]

        small, large = sizes(1.0), sizes(1.7)
        self.assertGreater(sum(large) / len(large), 1.3 * sum(small) / len(small))

    def test_words_that_hide_shorter_ones(self):
        self.assertEqual(poetry.meanings("今日人家"), [])
        self.assertEqual(poetry.meanings("正月江南"), [])
        self.assertEqual(poetry.meanings("明月松间照"), ["sky:圆月", "thing:松树"])
        self.assertEqual(poetry.poem_scenery(["sky:圆月", "thing:帆船"]), [("夜晚", "湖面")])
        self.assertFalse(poetry.is_drawable(["sky:圆月", "sky:夕阳", "thing:鸟"]))

    def test_things_stand_where_they_can(self):
        for record in RECORDS:
            for one in record["objects"]:
                thing = records.THINGS[one["name"]]
                self.assertTrue(record["kind"] == "closeup" or record["place"] in thing.places)
                self.assertEqual(len(one["boxes"]), one["count"])
                for x, y, width, height in one["boxes"]:
                    self.assertTrue(0 <= x and 0 <= y and x + width <= records.SIZE and y + height <= records.SIZE)
            self.assertLess(sum(s["name"] in ("圆月", "弯月") for s in record["sky"]), 2)
            self.assertTrue(all(record["time"] in records.SKY[s["name"]][2] for s in record["sky"]))

    def test_nothing_covers_anything_else(self):
        for shape in (0.4, 1.0, 2.2):
            for i in range(1500):
                record = records.random_record(random.Random(f"shape {i}"), dict.fromkeys(ASPECT, shape))
                self.assertLess(records.hides(record), check.MOST_COVERED, record)

    def test_flying_things_keep_below_the_moon(self):
        record = {"kind": "poem", "place": "湖面", "time": "夜晚", "objects": [records.new_object(None, "鸟", "noto", 3)], "relations": []}
        record["sky"] = [{"name": "圆月", "side": "右边", "style": "noto"}]
        records.finish(random.Random(1), record, ASPECT)
        moon = record["sky"][0]["boxes"][0]
        self.assertTrue(all(y >= moon[1] + moon[3] for x, y, w, h in record["objects"][0]["boxes"] if x + w > moon[0]))

    def test_poems_have_only_simplified_characters(self):
        self.assertTrue(poetry.is_simplified("明月松间照"))
        self.assertFalse(poetry.is_simplified("頼有明月"))
        self.assertEqual("頼簷疎鴈".translate(poetry.VARIANTS), "赖檐疏雁")
        self.assertTrue(all(poetry.is_simplified(standard) for standard in poetry.VARIANTS.values()))
        self.assertFalse(any(poetry.is_simplified(chr(variant)) for variant in poetry.VARIANTS))

    def test_captions_name_every_thing(self):
        for record in RECORDS:
            texts = records.captions(random.Random(0), record)
            for one in record["objects"]:
                self.assertIn(one["name"], texts[0])

    def test_tiny_build_has_no_faults(self):
        faults, asked = check.find_faults(SAMPLES)
        self.assertEqual(faults, {})
        for split in splits.SPLITS:
            if split != "heldout_poem":
                self.assertGreater(len(asked[split]), 20, split)

    def test_majority_answers_are_right_for_at_most_two_in_five(self):
        _, asked = check.find_faults(SAMPLES)
        kinds = check.baseline(asked["train"], check.answers(asked["train"]))
        self.assertEqual(set(kinds), {"what", "where", "how many", "which colour", "when", "yes-no"})
        for kind, accuracy in kinds.items():
            self.assertLessEqual(accuracy, 0.4, kind)

    def test_faults_are_found(self):
        train = next(s for s in SAMPLES if s[0] == "train")
        held = next(s for s in SAMPLES if s[0] == "heldout_pairs")

        def faults(*extra):
            return set(check.find_faults([*SAMPLES, *extra])[0])

        self.assertEqual(faults(("heldout", train[1], {**train[2], "captions": ["新"], "questions": []})), {"in two splits"})
        self.assertEqual(faults(("heldout", b"new", {**train[2], "questions": []})), {"in two splits"})
        self.assertEqual(faults(("train", b"new", {**held[2], "captions": ["新"], "questions": []})), {"held-out combination in train"})
        biased = [{"question": "现在是什么时候？", "answer": "夜晚", "type": "when"}] * 2000
        self.assertEqual(faults(("train", train[1], {**train[2], "questions": biased})), {"unbalanced question"})
        hidden = copy.deepcopy(train[2])
        hidden["scene"]["sky"] = [{"name": "白云", "side": "左边", "boxes": hidden["scene"]["objects"][0]["boxes"][:1]}]
        self.assertIn("covered", faults(("train", train[1], hidden)))

    def test_check_reads_shards(self):
        with tempfile.TemporaryDirectory() as folder:
            for split in splits.SPLITS:
                (Path(folder) / split).mkdir()
                with tarfile.open(Path(folder) / split / "00000.tar", "w") as tar:
                    for k, (_, png, meta) in enumerate(s for s in SAMPLES if s[0] == split):
                        for extension, content in (("png", png), ("json", json.dumps(meta).encode())):
                            member = tarfile.TarInfo(f"{k:09d}.{extension}")
                            member.size = len(content)
                            tar.addfile(member, io.BytesIO(content))
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                self.assertEqual(check.check(Path(folder)), 0)
            self.assertIn("faults: none", out.getvalue())

    def test_every_kind_of_held_out_combination_occurs(self):
        found = set().union(*map(splits.held_out, RECORDS))
        self.assertEqual(found, {"heldout_pairs", "heldout_count", "heldout_style", "heldout_colour"})


if __name__ == "__main__":
    unittest.main()
