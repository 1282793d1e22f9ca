"""Drawings made here in the place of the downloaded packages, for tests: build_scenes.py runs on them without a network.

    python3 scripts/scenes/fixtures.py OUT JOBS
"""

import contextlib
import sys
import unittest.mock
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import build_scenes  # noqa: E402
from scenes import images, poetry, records  # noqa: E402

COLOURS = ["#d03030", "#3070d0", "#30a050", "#e0b020", "#905020", "#808080"]
LINES = {"明月松间照": False, "孤帆带夕阳": False, "鱼戏莲叶间": True}


def drawing(style, code):
    """SVG of a shape with an eye, of its own for each style and code."""
    number = records.stable_hash(f"{style} {code}")
    colour, width, height = COLOURS[number % len(COLOURS)], 60 + number // 7 % 60, 60 + number // 11 % 60
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
            f'<ellipse cx="{width / 2}" cy="{height / 2}" rx="{width / 2}" ry="{height / 2}" fill="{colour}"/>'
            f'<circle cx="{width / 3}" cy="{height / 3}" r="{3 + number % 5}" fill="#202020"/></svg>')


def few_things():
    """Every sixth thing, and those of the lines: recolouring all of them would take a minute."""
    named = {name for line in LINES for kind, name in (meaning.split(":") for meaning in poetry.meanings(line)) if kind == "thing"}
    return {name: thing for k, (name, thing) in enumerate(records.THINGS.items()) if k % 6 == 0 or name in named}


@contextlib.contextmanager
def packages():
    """Replaces what is read from packages."""
    things, codes = few_things(), {code for code, *_ in records.SKY.values()}
    codes = sorted(codes | {thing.code for thing in things.values()})
    with contextlib.ExitStack() as stack:
        def replace(module, name, value):
            stack.enter_context(unittest.mock.patch.object(module, name, value))

        replace(build_scenes.emoji, "icon_keys", lambda cache: {})
        replace(build_scenes.emoji, "load_style", lambda style, cache, keys: [(code, drawing(style, code)) for code in codes])
        replace(build_scenes.emoji, "fetch", lambda package, cache: cache)
        replace(build_scenes, "poem_lines", lambda folder, pool: dict(LINES))
        stack.enter_context(unittest.mock.patch.dict(records.THINGS, things, clear=True))
        stack.enter_context(unittest.mock.patch.dict(images.SPRITES, clear=True))
        yield


def build(out, jobs):
    arguments = ["build_scenes.py", "--out", out, "--cache", f"{out}.cache", "--jobs", jobs, "--scenes", "36", "--heldout", "3", "--poems", "2", "--shard-size", "20"]
    with packages(), unittest.mock.patch.object(sys, "argv", arguments):
        build_scenes.main()


if __name__ == "__main__":
    build(*sys.argv[1:])
