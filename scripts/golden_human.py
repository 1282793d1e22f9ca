#!/usr/bin/env python3
"""Makes tests/golden/human.json: Krippendorff's alpha (ordinal metric) of tables of ratings by the package `krippendorff`,
and quantiles of Student's t by SciPy.

    python3 -m venv venv && venv/bin/pip install krippendorff==0.9.0 scipy==1.17.1
    venv/bin/python scripts/golden_human.py tests/golden/human.json

Rows of a table are raters, columns are rated outputs, null is a missing rating. An alpha of null means that the package
refuses the table or returns no number: no output has two ratings, or all ratings are equal.
"""
import json
import math
import random
import sys
import warnings
from importlib.metadata import version

import krippendorff
import numpy as np
from scipy import stats


def alpha(table):
    values = np.array([[np.nan if value is None else value for value in row] for row in table], dtype=float)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = float(krippendorff.alpha(reliability_data=values, level_of_measurement="ordinal"))
    except (ValueError, ZeroDivisionError):
        return None
    return found if math.isfinite(found) else None


def drawn(seed, raters, outputs, low, high, missing, noise):
    draw = random.Random(seed)
    truth = [draw.randint(low, high) for _ in range(outputs)]
    one = lambda value: min(high, max(low, value + draw.choice(range(-noise, noise + 1))))
    return [[None if draw.random() < missing else one(value) for value in truth] for _ in range(raters)]


TABLES = {
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), the four observers of section C.
    "krippendorff 2011": [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ],
    "two raters agree": [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]],
    "two raters disagree": [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]],
    "yes and no": [[0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1], [1, 1, 1, 0, 1, 0]],
    "unused steps of the scale": [[1, 5, 1, 5, 5], [1, 5, 5, 5, 1], [1, 5, 1, 1, 5]],
    "all ratings equal": [[3, 3, 3], [3, 3, 3]],
    "one rater": [[1, 2, 3, 4]],
    "no output with two ratings": [[1, None, 3, None], [None, 2, None, 4]],
    "equal where two rated, different elsewhere": [[2, 2, 5], [2, 2, None]],
    "ratings of one rater alone": [[1, 2, 3, None, 4], [1, 3, 3, 2, None], [None, None, None, None, None]],
    "three raters, 1 to 5": drawn(1, 3, 60, 1, 5, 0.0, 1),
    "five raters, 1 to 5, a third missing": drawn(2, 5, 80, 1, 5, 0.33, 2),
    "three raters, 0 to 2, some missing": drawn(3, 3, 200, 0, 2, 0.1, 1),
    "noise": drawn(4, 4, 50, 1, 5, 0.2, 4),
}
DEGREES = [1, 2, 3, 4, 5, 7, 10, 19, 29, 99, 499, 9999, 1_000_000]


def main():
    golden = {
        "made_by": "scripts/golden_human.py",
        "versions": {name: version(name) for name in ["krippendorff", "numpy", "scipy"]},
        "alpha": [{"name": name, "ratings": table, "ordinal": alpha(table)} for name, table in TABLES.items()],
        "t_975": [[degrees, float(stats.t.ppf(0.975, degrees))] for degrees in DEGREES],
    }
    with open(sys.argv[1], "w", encoding="utf-8") as out:
        json.dump(golden, out, ensure_ascii=False, separators=(",", ":"))
        out.write("\n")


if __name__ == "__main__":
    main()
