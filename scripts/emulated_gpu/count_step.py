#!/usr/bin/env python3
"""Counts what a training step asks of the emulated GPU, and compares it with `vilg plan --roofline` and with counts.json.

    count_step.py VILG [--renew]      # --renew: writes counts.json

Products must be those of the plan. Its other ops must be most of what is launched: it leaves out what happens once a step, and
sums of micro-batches. Counts that differ from counts.json tell that a step has become longer or shorter.
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
    "f32": ["train.precision=f32"],
    "bf16": ["train.precision=bf16"],
    "bf16, kernels": ["train.precision=bf16", "--kernels", "fused"],
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
        "model.hidden=64", "model.heads=2", "train.batch_size=4", "train.caption_batch_size=4", "train.warmup_steps=1",
        "train.sample_every=0",
    ]  # fmt: skip
    sets += [setting for setting in more if "=" in setting]
    options = [setting for setting in more if "=" not in setting]
    return ["--config", str(ROOT / "configs/emoji.toml"), *sum((["--set", setting] for setting in sets), []), *options]


def counts_of(log: Path) -> dict[str, int]:
    return json.loads(log.read_text().splitlines()[-1])


def step(vilg: str, folder: Path, name: str, more: list[str]) -> dict[str, int]:
    """What the second step does: a run of two steps less a run of one."""
    runs = []
    for steps in (1, 2):
        log = folder / f"{steps}.log"
        log.unlink(missing_ok=True)
        command = [vilg, "train", *settings(f"{name}-{steps}", more, folder / "codes"), "--set", f"train.steps={steps}"]
        environment = os.environ | {"EMULATED_GPU_LOG": str(log)}
        subprocess.run([*command, "--device", "cuda", "--quiet"], cwd=folder, env=environment, check=True)
        runs.append(counts_of(log))
    first, both = runs
    found: dict[str, int] = {}
    for what, count in both.items():
        kind = next((kind for pattern, kind in KINDS if re.match(pattern, what)), None)
        if kind:
            found[kind] = found.get(kind, 0) + count - first.get(what, 0)
    return dict(sorted((kind, count) for kind, count in found.items() if count))


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
            plan = planned(vilg, folder, more)
            print(json.dumps({"name": title, "step": found[title], "plan": plan}), flush=True)
            launches = sum(count for kind, count in found[title].items() if kind not in HOST)
            if found[title]["matrix products"] != plan["matrix products"] or not 0.75 <= sum(plan.values()) / launches <= 1:
                print(f"{title}: the plan has other ops than the step", file=sys.stderr)
                bad = True
            if not renew and found[title] != pinned.get(title):
                print(f"{title}: {PINNED.name} has {json.dumps(pinned.get(title))}", file=sys.stderr)
                bad = True
    if renew:
        PINNED.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(bad)


if __name__ == "__main__":
    main()
