"""Runs `vilg bench` and bench_pytorch.py alternately and compares medians. Started by bench_vs_pytorch.sh.

Every run is a process of its own with one warm-up and one repetition that counts, and a round runs each side once, so
that a machine that gets slower does so for both. Before the rounds each of PyTorch's settings is tried once: vilg is
compared with the fastest of those that calculate as exactly as it does or more exactly.
"""

import argparse
import json
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys

PEER = pathlib.Path(__file__).with_name("bench_pytorch.py")

# Name: vilg's arguments, PyTorch's arguments, PyTorch's settings to choose from.
PRECISIONS = [["--precision", "f32"], ["--precision", "bf16"]]
INT8 = [["--precision", "int8"]]
DALLE = [[*p, "--attention", a] for p in PRECISIONS for a in ("full", "axial")]
WORKS = {
    "train": (["train"], ["train"], PRECISIONS),
    "tokenizer": (["tokenizer"], ["tokenizer"], PRECISIONS),
    "matcher": (["matcher", "--batch", "64"], ["matcher", "--batch", "64"], PRECISIONS),
    "embed": (["embed", "--batch", "64"], ["embed", "--batch", "64"], PRECISIONS),
    "decode-1": (["decode", "--batch", "1"], ["decode", "--batch", "1"], PRECISIONS + INT8),
    "decode-16": (["decode", "--batch", "16"], ["decode", "--batch", "16"], PRECISIONS + INT8),
    "dalle-train": (["train"], ["dalle-train"], DALLE),
    "dalle-decode-1": (["decode", "--batch", "1"], ["dalle-decode", "--batch", "1"], DALLE),
}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="command that starts a Python with PyTorch")
    parser.add_argument("--vilg", required=True, help="command that starts vilg")
    parser.add_argument("--works", default=",".join(WORKS), help="some of: %(default)s")
    parser.add_argument("--precisions", default="f32,bf16,int8", help="some of: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a setting of PyTorch is given up")
    parser.add_argument("--compile", action="store_true", help="try torch.compile as well")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file")
    return parser.parse_args()


def run(command, limit=None):
    """The JSON object that a command prints, or None if it takes too long or fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        print(f"failed: {shlex.join(command)}\n{done.stderr[-1000:]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def torch_command(args, work, setting, warmup=1):
    return [*shlex.split(args.python), str(PEER), *work, *setting, "--repeat", "1", "--warmup", str(warmup)]


def vilg_commands(args, work):
    """One entry for each precision of this build of vilg."""
    base = [*shlex.split(args.vilg), "bench", work[0]]
    help_text = subprocess.run([*base, "--help"], capture_output=True, text=True, check=True).stdout
    command = [*base, *work[1:], "--repeat", "1", "--json"]
    if "--precision" not in help_text:
        return {"f32": command}
    precisions = ["f32", "bf16", "int8"] if "int8" in help_text else ["f32", "bf16"]
    return {p: [*command, "--precision", p] for p in precisions if p in args.precisions.split(",")}


def speed(result):
    """Result of the single repetition: (amount per second, seconds, bytes)."""
    seconds = result["seconds"]
    seconds = seconds[0] if isinstance(seconds, list) else seconds["all"][0]
    return result["amount"] / seconds, seconds, result["peak_memory_bytes"]


def choose(args, work, settings):
    """PyTorch's settings sorted by a first run, fastest first, without those that are too slow."""
    settings = [s + c for s in settings for c in ([], ["--compile"])[: 1 + args.compile]]
    tried = []
    for setting in settings:
        # Compilation happens in the warm-up and must not count.
        result = run(torch_command(args, work, setting), args.limit)
        found = speed(result)[1] if result else float("inf")
        print(f"  PyTorch {shlex.join([*work, *setting])}: {found:.3f} s", file=sys.stderr)
        tried.append((found, setting))
    tried.sort(key=lambda pair: pair[0])
    return [{"setting": setting, "seconds": found} for found, setting in tried]


EXACTNESS = ["f32", "bf16", "int8"]


def fastest(tried, precision):
    """The fastest setting that is at least as precise as `precision`."""
    exact = EXACTNESS[: EXACTNESS.index(precision) + 1]
    return next(t["setting"] for t in tried if t["setting"][1] in exact)


def compare(args, name):
    ours, theirs, settings = WORKS[name]
    # A setting less precise than all of vilg's would never be compared.
    tried = choose(args, theirs, [s for s in settings if s[1] in args.precisions.split(",")])
    commands = {("vilg", p): command for p, command in vilg_commands(args, ours).items()}
    peers = {p: fastest(tried, p) for _, p in commands}
    commands |= {("PyTorch", shlex.join(s)): torch_command(args, theirs, s) for s in peers.values()}
    runs = {key: [] for key in commands}
    for number in range(args.rounds):
        print(f"{name}: round {number + 1} of {args.rounds}", file=sys.stderr)
        for key, command in commands.items():
            runs[key].append(run(command) or sys.exit(1))
    rows = []
    for (side, precision), results in runs.items():
        if side != "vilg":
            continue
        setting = shlex.join(peers[precision])
        row = {"work": name, "precision": precision, "setting": setting}
        rows.append({**row, "vilg": median_of(results), "pytorch": median_of(runs["PyTorch", setting])})
    for (side, setting), results in runs.items():
        disturbed = [r for r in results if "cpu_seconds" in r and sum(r["cpu_seconds"]) < 0.85 * r["threads"] * sum(r["seconds"])]
        if disturbed:
            print(f"warning: {name}, {side} {setting}: something else ran in {len(disturbed)} rounds", file=sys.stderr)
    raw = [{"side": side, "setting": setting, "results": results} for (side, setting), results in runs.items()]
    return rows, {"work": name, "tried": tried, "runs": raw}


def median_of(results):
    # dalle-pytorch counts training in sequences and vilg in tokens, so seconds per step are compared.
    found = [speed(result) for result in results]
    return {
        "seconds": statistics.median(f[1] for f in found),
        "amount_per_second": statistics.median(f[0] for f in found),
        "unit": results[0]["unit"],
        "memory_bytes": max(f[2] for f in found),
    }


def main():
    args = parse()
    for option, command in (("--python", args.python), ("--vilg", args.vilg)):
        if not shutil.which(shlex.split(command)[0]):
            sys.exit(f"{option} {command}: there is no such program")
    rows, raw = [], []
    for name in args.works.split(","):
        found = compare(args, name)
        rows += found[0]
        raw.append(found[1])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"rounds": args.rounds, "rows": rows, "raw": raw}, indent=1))
    print("| work | vilg | PyTorch, its settings | times faster | memory, share of PyTorch's |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        ours, theirs = row["vilg"], row["pytorch"]
        cells = [
            f"{row['work']}, {row['precision']}",
            f"{ours['seconds']:.3f} s, {ours['amount_per_second']:.0f} {ours['unit']}/s",
            f"{theirs['seconds']:.3f} s ({row['setting'].replace('--', '')})",
            f"**{theirs['seconds'] / ours['seconds']:.2f}**",
            f"{ours['memory_bytes'] / 1e9:.2f} GB, {ours['memory_bytes'] / theirs['memory_bytes']:.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


main()
