#!/usr/bin/env python3
"""Compares what a training step and a micro-step ask of the emulated GPU with `vilg plan --roofline` and with counts.json.

    count_step.py VILG [--renew]      # --renew: writes counts.json

The matrix products of a micro-step must be those of the plan, and the plan's launches at least four fifths of all: it leaves out the
embedding and the sums of gradients over micro-steps. Counts that differ from counts.json tell that a step has become longer or
shorter.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PINNED = Path(__file__).with_name("counts.json")

CONFIGURATIONS = {
    "bf16": ["train.precision=bf16"],
    "bf16, kernels, no offload": ["train.precision=bf16", "train.offload=none", "--kernels", "fused"],
    "bf16, checkpointing": ["train.precision=bf16", "train.activation_checkpointing=1"],
}  # fmt: skip

# Kernels of candle by their names; all others are ours.
KINDS = [
    (r"launch ucopy_|launch copy2d_|copy on the device", "copies"),
    (r"launch cast_", "casts"),
    (r"launch fast_", "sums"),
    (r"launch (is|ia|gather|sa|s)_", "lookups"),
    (r"fill|launch const_set_", "fills"),
    (r"launch (b[a-z]+|affine|u[a-z]+|where)_\w+", "element-wise ops"),
    (r"launch ", "kernels of ours"),
    (r"products", "matrix products"),
    (r"copy from the host", "copies from the host"),
    (r"copy to the host", "copies to the host"),
    (r"synchronize", "synchronizations"),
    (r"bytes (from|to) the host", None),
]
HOST = {"copies from the host", "copies to the host", "synchronizations"}


def settings(name: str, more: list[str], data: Path) -> list[str]:
    sets = [
        f"name={name}", f'data.sources=[{{path="{data}"}}]', "text.vocab=demo", "image_tokenizer.path=demo", "model.layers=4",
        "model.hidden=32", "model.heads=2", "train.batch_size=2", "train.caption_batch_size=2", "train.warmup_steps=1",
        "train.sample_every=0",
    ]  # fmt: skip
    sets += [setting for setting in more if "=" in setting]
    options = [setting for setting in more if "=" not in setting]
    return ["--config", str(ROOT / "configs/emoji.toml"), *sum((["--set", setting] for setting in sets), []), *options]


def counts(vilg: str, folder: Path, name: str, more: list[str]) -> dict[str, int]:
    """What a run does."""
    log = folder / f"{name}.log"
    command = [vilg, "train", *settings(name, more, folder / "codes"), "--device", "cuda", "--quiet"]
    subprocess.run(command, cwd=folder, env=os.environ | {"EMULATED_GPU_LOG": str(log)}, check=True)
    return json.loads(log.read_text())


def difference(more: dict[str, int], less: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for what, count in more.items():
        kind = next((kind for pattern, kind in KINDS if re.match(pattern, what)), None)
        if kind:
            found[kind] = found.get(kind, 0) + count - less.get(what, 0)
    return dict(sorted((kind, count) for kind, count in found.items() if count))


def step(vilg: str, folder: Path, name: str, more: list[str]) -> dict[str, dict[str, int]]:
    """What one more step does, and one more micro-step."""
    one = counts(vilg, folder, f"{name}-1", [*more, "train.steps=1"])
    two = counts(vilg, folder, f"{name}-2", [*more, "train.steps=2"])
    larger = ["train.steps=1", "train.accumulation=2", "train.batch_size=4", "train.caption_batch_size=4"]
    accumulated = counts(vilg, folder, f"{name}-3", [*more, *larger])
    return {"step": difference(two, one), "micro-step": difference(accumulated, one)}


def planned(vilg: str, folder: Path, more: list[str]) -> dict[str, float]:
    command = [vilg, "plan", *settings("plan", more, folder / "codes"), "--gpus", "1", "--gpu-memory", "80", "--gpu-tflops", "100"]
    command += ["--gpu-bandwidth", "1", "--roofline", "--json", "--quiet"]
    found = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True).stdout)
    kernels = "fused" if "fused" in more else "stock"
    roofline = next(roofline for roofline in found["rooflines"] if roofline["kernels"] == kernels)
    return {name: share["launches"] for name, share in roofline["ops"]}


def main() -> None:
    vilg, renew = sys.argv[1], sys.argv[2:] == ["--renew"]
    pinned = json.loads(PINNED.read_text()) if PINNED.exists() else {}
    found, bad = {}, False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for i in range(8):
            (folder / f"images/{i}.png").write_bytes((ROOT / "src/demo/sample.png").read_bytes())
            (folder / f"images/{i}.txt").write_text(f"一张细腻风格的图片，第{i}张\n")
        encode = [vilg, "data", "encode", "images", "--model", "demo", "-o", "codes", "--device", "cpu", "--quiet"]
        subprocess.run(encode, cwd=folder, check=True)
        for i, (title, more) in enumerate(CONFIGURATIONS.items()):
            found[title] = step(vilg, folder, f"step-{i}", more)
            plan, micro = planned(vilg, folder, more), found[title]["micro-step"]
            launches = sum(count for kind, count in micro.items() if kind not in HOST)
            print(json.dumps({"name": title, **found[title], "plan": plan, "launches": launches}), flush=True)
            if micro["matrix products"] != plan["matrix products"] or not 0.8 <= sum(plan.values()) / launches <= 1.1:
                print(f"{title}: the plan has other ops than the micro-step", file=sys.stderr)
                bad = True
            if not renew and found[title] != pinned.get(title):
                print(f"{title}: {PINNED.name} has {json.dumps(pinned.get(title))}", file=sys.stderr)
                bad = True
    if renew:
        PINNED.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bad)


if __name__ == "__main__":
    main()
