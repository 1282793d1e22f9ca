#!/usr/bin/env python3
"""Tests of the pure parts of build_scenes.py, without network, packages or pictures: python3 scripts/test_scenes.py"""

import collections
import random
import unittest

from scenes import records

ASPECT = {(style, name, colour): 1.0 for style in records.STYLES for name, thing in records.THINGS.items() for colour in (None, *thing.colours)}
RECORDS = [records.random_record(random.Random(f"test {i}"), ASPECT) for i in range(3000)]


class Scenes(unittest.TestCase):
    def test_lexicon_names_only_what_can_be_drawn(self):
        known = {"thing": records.THINGS, "sky": records.SKY, "time": records.TIMES, "place": records.PLACES, "weather": ["下雪", "下雨"]}
        for word, meaning in records.LEXICON.items():
            if meaning != "-":
                kind, name = meaning.split(":")
                self.assertIn(name, known[kind], word)
        self.assertGreaterEqual(len(records.THINGS), 150)

    def test_words_that_hide_shorter_ones(self):
        self.assertEqual(records.meanings("今日人家"), [])
        self.assertEqual(records.meanings("正月江南"), [])
        self.assertEqual(records.meanings("明月松间照"), ["sky:圆月", "thing:松树"])
        self.assertEqual(records.poem_scenery(["sky:圆月", "thing:帆船"]), [("夜晚", "湖面")])
        self.assertFalse(records.is_drawable(["sky:圆月", "sky:夕阳", "thing:鸟"]))

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

    def test_boxes_of_a_group_do_not_cover_each_other(self):
        for record in RECORDS:
            for one in record["objects"]:
                for i, (x, y, w, h) in enumerate(one["boxes"]):
                    for ox, oy, ow, oh in one["boxes"][i + 1 :]:
                        covered = max(0, min(x + w, ox + ow) - max(x, ox)) * max(0, min(y + h, oy + oh) - max(y, oy))
                        self.assertLess(covered, 0.25 * w * h, record)

    def test_captions_name_every_thing(self):
        for record in RECORDS:
            texts = records.captions(random.Random(0), record)
            for one in record["objects"]:
                self.assertIn(one["name"], texts[0])

    def test_balanced_questions(self):
        candidates = [q for record in RECORDS for q in records.questions(random.Random(0), record)]
        answers = collections.defaultdict(collections.Counter)
        for index in records.balance(candidates):
            question, answer, _ = candidates[index]
            answers[question][answer] += 1
        self.assertGreater(len(answers), 100)
        for question, counts in answers.items():
            self.assertLessEqual(max(counts.values()), 0.4 * sum(counts.values()), question)

    def test_every_kind_of_held_out_combination_occurs(self):
        found = set().union(*map(records.held_out, RECORDS))
        self.assertEqual(found, {"heldout_pairs", "heldout_count", "heldout_style", "heldout_colour"})


if __name__ == "__main__":
    unittest.main()
