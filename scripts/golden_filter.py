#!/usr/bin/env python3
"""Makes tests/golden/filter/jieba.tsv (for each caption in captions.tsv: number of words by Python's jieba.cut without
punctuation, and whether jieba.posseg finds a noun) and tests/golden/filter/phash.tsv (pHash by Python's ImageHash of images by a formula).

    python3 -m venv venv && venv/bin/pip install jieba==0.42.1 ImageHash==4.3.2 pillow
    venv/bin/python scripts/golden_filter.py tests/golden/filter
"""
import pathlib
import sys
from importlib.metadata import version

import imagehash
import jieba.posseg
from PIL import Image


def image(number):
    """An image of 128 x 96 pixels with slow waves; src/data/filter/tests.rs has the same formula."""
    def pixel(x, y):
        wave = (x * (3 + number) + y * (5 - number % 3) + x * y * number // 64) % 512
        level = wave if wave < 256 else 511 - wave
        return level, (level + 40 * number) % 256, 255 - level
    image = Image.new("RGB", (128, 96))
    image.putdata([pixel(x, y) for y in range(96) for x in range(128)])
    return image


def main(folder):
    captions = [line.split("\t")[1] for line in (folder / "captions.tsv").read_text("utf-8").splitlines()]
    with open(folder / "jieba.tsv", "w", encoding="utf-8") as file:
        file.write(f"# jieba {version('jieba')}\n")
        for caption in captions:
            words = sum(any(c.isalnum() for c in word) for word in jieba.cut(caption))
            noun = int(any(flag.startswith("n") for _, flag in jieba.posseg.cut(caption)))
            file.write(f"{words}\t{noun}\t{caption}\n")
    with open(folder / "phash.tsv", "w", encoding="utf-8") as file:
        file.write(f"# ImageHash {version('ImageHash')}\n")
        for number in range(8):
            file.write(f"{number}\t{imagehash.phash(image(number))}\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
