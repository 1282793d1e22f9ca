#!/usr/bin/env python3
"""Makes tests/golden/bicubic.safetensors: random images and what Pillow's BICUBIC makes of them, as `INDEX.from` and
`INDEX.to`, (height, width, 3) in 0..255.

    python3 -m venv venv && venv/bin/pip install pillow==13.0.0 numpy safetensors
    venv/bin/python scripts/golden_bicubic.py tests/golden/bicubic.safetensors
"""
import sys
from importlib.metadata import version

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

# Width and height before and after: reduced, enlarged, both, one axis only, sides of one pixel, the same.
SIZES = [
    ((37, 23), (16, 16)), ((16, 16), (37, 29)), ((48, 20), (32, 32)), ((9, 7), (9, 20)), ((8, 30), (5, 30)), ((33, 33), (32, 32)),
    ((1, 1), (4, 3)), ((5, 5), (1, 1)), ((1, 40), (3, 4)), ((90, 3), (7, 32)), ((2, 2), (3, 3)), ((61, 47), (14, 14)), ((12, 12), (12, 12)),
]


def main():
    random = np.random.default_rng(4)
    out = {}
    for index, (before, after) in enumerate(SIZES):
        # Extreme values as well: their results over- and undershoot 0..255.
        pixels = random.integers(0, 256, (before[1], before[0], 3))
        pixels = np.where(random.random(pixels.shape) < 0.3, 255 * (pixels > 127), pixels).astype(np.uint8)
        resized = np.asarray(Image.fromarray(pixels).resize(after, Image.Resampling.BICUBIC))
        out[f"{index:02}.from"], out[f"{index:02}.to"] = pixels.astype(np.float16), resized.astype(np.float16)
    save_file(out, sys.argv[1], {"pillow": version("pillow"), "numpy": version("numpy")})


if __name__ == "__main__":
    main()
