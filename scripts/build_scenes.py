#!/usr/bin/env python3
"""Build images of scenes with Chinese captions, lines of poetry and questions.

Images  openly licensed emoji drawings (STYLES of scenes/records.py) on drawn backgrounds
Text      drawn from the record of a scene; lines of poetry from npm chinese-poetry
Output    WebDataset shards as build_emoji.py writes them, in OUT/{train,heldout,heldout_*}, beside OUT/ATTRIBUTION.md
          and OUT/dataset_stats.json

Needs npm, Pillow, resvg_py and OpenCC; scripts/build_scenes.sh provides them. Every choice follows from a hash, so two
builds give the same bytes. `--check DIR` verifies a build, `--sheet PNG` draws 24 scenes of one.
"""

import argparse
import collections
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import build_emoji as emoji
from PIL import Image
from scenes import records
from scenes.check import check, read_split
from scenes.images import aspects, load_sprites, render
from scenes.poetry import poem_lines
from scenes.records import SIZE, THINGS, stable_hash
from scenes.splits import SPLITS, ask, plan

emoji.PACKAGES["chinese-poetry"] = "2.0.1"


def build(out, cache, args):
    began = time.time()
    fork = multiprocessing.get_context("fork")  # the painters inherit the sprites
    with ProcessPoolExecutor(args.jobs, fork) as pool:
        load_sprites(cache, pool)
        lines = poem_lines(emoji.fetch("chinese-poetry", cache), pool) if args.poems else {}
    aspect, digests = aspects(), {}
    summary = {"things": len({n for _, n, _ in aspect} & set(THINGS)), "splits": {}, "lines found": len(lines)}
    with ProcessPoolExecutor(args.jobs, fork) as pool:
        print(f"{time.time() - began:.0f} s: {len(aspect)} sprites, {len(lines)} lines", flush=True)
        by_split, count, drops = plan(args, lines, aspect)
        print(f"{time.time() - began:.0f} s: records, {dict(count)} poems", flush=True)
        for split in SPLITS:
            rows = sorted(by_split[split], key=lambda row: stable_hash("shuffle " + row[0]))
            shards, asked = emoji.Shards(out / split, args.shard_size), ask(rows)
            for (_, record, texts), questions, png in zip(rows, asked, pool.map(render, [r[:2] for r in rows], chunksize=64)):
                digest = hashlib.sha256(png).hexdigest()
                if digests.setdefault(digest, split) != split:
                    drops["image of another split"] += 1
                    continue
                shards.add(png, texts[0], {"caption": texts[0], "captions": texts, "scene": record, "questions": questions, "split": split,
                           "width": SIZE, "height": SIZE, "sha256": digest, "status": "success"})
            shards.close()
            summary["splits"][split] = shards.count
            print(f"{time.time() - began:.0f} s: {split} {shards.count}", flush=True)
    return summary | {"poems": dict(count), "dropped": dict(drops)}


def attribution():
    lines = ["# Sources", "", "Drawings were rasterised, scaled, recoloured and composed into scenes.", ""]
    for style in records.STYLES:
        package, _, license, author = emoji.STYLES[style]
        lines.append(f"- {style}: {author} — {license} — npm {package}@{emoji.PACKAGES[package]}")
    lines.append(f"- poetry: chinese-poetry contributors — MIT — npm chinese-poetry@{emoji.PACKAGES['chinese-poetry']}; simplified with OpenCC (Apache-2.0)")
    return "\n".join(lines) + "\n"


def sheet(out, path):
    """24 scenes in an image, with their captions on standard output."""
    image = Image.new("RGB", (6 * 132 + 4, 4 * 132 + 4), "white")
    for k, (png, meta) in enumerate(row for row, _ in zip(read_split(out / "train"), range(24))):
        image.paste(Image.open(io.BytesIO(png)), (4 + k % 6 * 132, 4 + k // 6 * 132))
        print(k // 6 + 1, k % 6 + 1, meta["captions"][:3])
    image.quantize(255).save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/scenes"), help="folder to make (default: data/scenes)")
    parser.add_argument("--cache", type=Path, default=Path("data/emoji.npm"), help="folder of downloaded packages (default: data/emoji.npm)")
    parser.add_argument("--scenes", type=int, default=30000, help="training scenes without poems (default: 30000)")
    parser.add_argument("--poems", type=int, default=21000, help="training lines of poetry (default: 21000; 0: none)")
    parser.add_argument("--heldout", type=int, default=600, help="samples of each held-out split (default: 600)")
    parser.add_argument("--object-scale", type=float, default=1.0, help="size of the things, as far as the image allows (default: 1)")
    parser.add_argument("--shard-size", type=int, default=1000, help="samples a shard (default: 1000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--check", type=Path, metavar="DIR", help="verify a build instead")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw 24 scenes of --out instead")
    args = parser.parse_args()
    if args.check:
        sys.exit(check(args.check))
    if args.sheet:
        return sheet(args.out, args.sheet)
    if args.out.exists():
        parser.error(f"{args.out} exists; remove it to build it again")
    if not 0.5 <= args.object_scale <= 3:
        parser.error("--object-scale must be from 0.5 to 3")
    records.OBJECT_SCALE = args.object_scale
    cache = args.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    summary = build(part, cache, args)
    (part / "dataset_stats.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")
    (part / "ATTRIBUTION.md").write_text(attribution(), encoding="utf-8")
    part.rename(args.out)
    print(json.dumps({"out": str(args.out), **summary}, ensure_ascii=False))


if __name__ == "__main__":
    main()
