#!/usr/bin/env python3
"""Tests of the images of scenes, on drawings made by scenes/fixtures.py: python3 scripts/test_scene_images.py

Needs Pillow and resvg_py, as scripts/venv.sh installs them, but no network and no package of drawings.
"""

import colorsys
import hashlib
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import unittest
import unittest.mock
from pathlib import Path

from PIL import Image, ImageDraw
from scenes import check, images, records
from scenes.splits import SPLITS

FIXTURES = Path(__file__).parent / "scenes" / "fixtures.py"


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


class Builds(unittest.TestCase):
    def test_two_builds_give_the_same_bytes(self):
        with tempfile.TemporaryDirectory() as folder:
            runs = []
            # Another order of sets, and another number of processes.
            for name, seed, jobs in (("a", "1", "1"), ("b", "2", "3")):
                command = [sys.executable, FIXTURES, f"{folder}/{name}", jobs]
                runs.append(subprocess.Popen(command, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
            for run in runs:
                said, _ = run.communicate()
                self.assertEqual(run.returncode, 0, said)
            first, second = (digests(Path(folder, name)) for name in "ab")
            self.assertEqual(first, second)
            self.assertLessEqual({"ATTRIBUTION.md", "dataset_stats.json", "train/00000.tar", "train/00001.tar", "heldout/00000.tar"}, set(first))
            samples = {split: list(check.read_split(Path(folder, "a", split))) for split in SPLITS}
            self.assertEqual(len(samples["train"]), 36 + 2)
            different = {png for rows in samples.values() for png, _ in rows}
            self.assertEqual(len(different), sum(map(len, samples.values())), "each record has an image of its own")
            faults, _ = check.find_faults([(split, *sample) for split, rows in samples.items() for sample in rows])
            self.assertEqual(faults, {})
            with tarfile.open(Path(folder, "a", "train", "00000.tar")) as shard:
                self.assertEqual({(member.mtime, member.uid, member.uname) for member in shard}, {(0, 0, "")})


def disc(colour, radius=18, size=48):
    """A disc with a dark outline on a transparent ground."""
    sprite = Image.new("RGBA", (size, size))
    box = [size / 2 - radius, size / 2 - radius, size / 2 + radius, size / 2 + radius]
    ImageDraw.Draw(sprite).ellipse(box, fill=colour, outline=(20, 20, 20), width=3)
    return sprite


def hsv(pixel):
    return colorsys.rgb_to_hsv(*(value / 255 for value in pixel[:3]))


class Recolouring(unittest.TestCase):
    def test_it_changes_the_hue_and_keeps_the_shape(self):
        for colour, hue in images.HUES.items():
            for before in ((200, 40, 40, 255), (40, 90, 200, 255)):
                sprite = disc(before)
                changed = images.recolour(sprite, colour)
                self.assertEqual(changed.size, sprite.size)
                self.assertEqual(changed.getchannel("A").tobytes(), sprite.getchannel("A").tobytes())
                found, saturation, value = hsv(changed.getpixel((24, 24)))
                self.assertLess(min(abs(found * 360 - hue), 360 - abs(found * 360 - hue)), 3, colour)
                self.assertGreater(saturation, 0.6)
                self.assertGreater(value, 0.25)
                self.assertEqual(changed.getpixel((24, 7)), sprite.getpixel((24, 7)), "the outline stays")

    def test_white_is_light_and_black_is_dark(self):
        sprite = disc((200, 40, 40, 255))
        _, saturation, value = hsv(images.recolour(sprite, "白").getpixel((24, 24)))
        self.assertTrue(saturation < 0.15 and value > 0.9)
        _, saturation, value = hsv(images.recolour(sprite, "黑").getpixel((24, 24)))
        self.assertTrue(saturation < 0.25 and value < 0.3)

    def test_shades_of_the_main_colour_stay_apart(self):
        sprite = disc((230, 60, 60, 255))
        ImageDraw.Draw(sprite).rectangle([20, 20, 28, 28], fill=(140, 20, 20, 255))
        changed = images.recolour(sprite, "蓝")
        self.assertGreater(hsv(changed.getpixel((24, 36)))[2], hsv(changed.getpixel((24, 24)))[2] + 0.2)

    def test_a_colour_that_changes_too_little_is_none(self):
        self.assertIsNone(images.recolour(disc((128, 128, 128, 255)), "红"))
        mostly_grey = disc((128, 128, 128, 255))
        ImageDraw.Draw(mostly_grey).ellipse([20, 20, 28, 28], fill=(200, 40, 40, 255))
        self.assertIsNone(images.recolour(mostly_grey, "蓝"))


def scene(place, names, time="白天", depth="中间", kind="scene"):
    record = {"kind": kind, "time": time, "place": place, "weather": None, "sky": [], "relations": [], "style": "noto", "line": None, "objects": []}
    for name in names:
        record["objects"].append({**records.new_object(None, name, "noto"), "side": "中间", "depth": depth})
    records.lay_out(random.Random(1), record, {})
    return record


class Drawing(unittest.TestCase):
    """Every thing is a red square, so that its place in the image can be measured."""

    def setUp(self):
        red = Image.new("RGBA", (64, 64), (220, 30, 30, 255))
        sprites = {("noto", name, None): red for name in [*records.THINGS, *records.SKY]}
        patch = unittest.mock.patch.dict(images.SPRITES, sprites, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(images.sprite.cache_clear)
        images.sprite.cache_clear()

    def thing(self, place, stand):
        return next(thing.name for thing in records.THINGS.values() if place in thing.places and thing.stand == stand)

    def drawn(self, record):
        """The image of a record, and the same without its things."""
        return images.draw(random.Random(3), record), images.draw(random.Random(3), {**record, "objects": []})

    def test_nearer_things_are_larger_and_lower(self):
        sizes, feet = [], []
        for depth in ("近处", "中间", "远处"):
            record = scene("草地", [self.thing("草地", "ground")], depth=depth)
            (x, y, width, height), = record["objects"][0]["boxes"]
            image, _ = self.drawn(record)
            red = [(i % 128, i // 128) for i, pixel in enumerate(zip(*[iter(image.tobytes())] * 3)) if pixel == (220, 30, 30)]
            self.assertEqual((min(red), max(red)), ((x, y), (x + width - 1, y + height - 1)), depth)
            sizes.append(height)
            feet.append(y + height)
        self.assertEqual(sizes, sorted(sizes, reverse=True))
        self.assertEqual(feet, sorted(feet, reverse=True))
        near, middle, far = (records.DEPTHS[depth][0] for depth in ("近处", "中间", "远处"))
        self.assertAlmostEqual(sizes[0] / sizes[1], near / middle, delta=0.12)
        self.assertAlmostEqual(sizes[2] / sizes[1], far / middle, delta=0.12)

    def test_things_on_the_ground_have_a_shadow_below_them(self):
        for place, stand, kind, darker in (("草地", "ground", "scene", True), ("草地", "air", "scene", False), ("草地", "ground", "closeup", False)):
            record = scene(place, [self.thing(place, stand)], kind=kind)
            (x, y, width, height), = record["objects"][0]["boxes"]
            image, empty = self.drawn(record)
            below = (x + width // 2, y + height)
            difference = sum(empty.getpixel(below)) - sum(image.getpixel(below))
            self.assertTrue(difference > 60 if darker else difference == 0, (stand, kind, difference))
            # Nothing else has changed: above the thing, and beside it.
            for other in ((x + width // 2, y - 3), (x - 4, y + height // 2), (x + width + 4, y + height // 2)):
                self.assertEqual(image.getpixel(other), empty.getpixel(other))

    def test_boats_are_mirrored_in_the_water(self):
        record = scene("湖面", [self.thing("湖面", "float")])
        (x, y, width, height), = record["objects"][0]["boxes"]
        image, empty = self.drawn(record)
        below = (x + width // 2, y + height + 1)
        (red, _, blue), (red_before, _, blue_before) = image.getpixel(below), empty.getpixel(below)
        self.assertTrue(red > red_before + 20 and blue < blue_before - 10)

    def test_things_are_darker_at_night_but_not_lamps(self):
        ground = self.thing("街道", "ground")
        for name, place, factor in ((ground, "街道", 0.82), ("灯笼", records.THINGS["灯笼"].places[0], 1.0)):
            record = scene(place, [name], time="夜晚")
            (x, y, width, height), = record["objects"][0]["boxes"]
            image, _ = self.drawn(record)
            self.assertEqual(image.getpixel((x + width // 2, y + height // 2)), tuple(round(c * factor) for c in (220, 30, 30)), name)


if __name__ == "__main__":
    unittest.main()
