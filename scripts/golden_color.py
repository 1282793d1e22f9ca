#!/usr/bin/env python3
"""Makes tests/golden/color.json: scikit-image's CIE76 difference (deltaE_cie76 of rgb2lab) of pairs of 8-bit sRGB colors.

    python3 -m venv venv && venv/bin/pip install scikit-image
    venv/bin/python scripts/golden_color.py tests/golden/color.json
"""
import json
import sys

import numpy as np
import skimage
from skimage.color import deltaE_cie76, rgb2lab


def main():
    random = np.random.default_rng(5)
    colors = random.integers(0, 256, (40, 2, 3), dtype=np.uint8)
    corners = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [1, 2, 3], [8, 10, 12], [128, 128, 128]]
    colors = np.concatenate([colors, np.array([[a, b] for a in corners for b in corners if a != b], dtype=np.uint8)])
    lab = rgb2lab(colors)
    pairs = [
        {"a": a.tolist(), "b": b.tolist(), "delta_e": float(deltaE_cie76(*of_pair))}
        for (a, b), of_pair in zip(colors, lab)
    ]
    with open(sys.argv[1], "w") as out:
        out.write('{"scikit-image": ' + json.dumps(skimage.__version__) + ', "pairs": [\n')
        out.write(",\n".join(json.dumps(pair) for pair in pairs) + "\n]}\n")


if __name__ == "__main__":
    main()
