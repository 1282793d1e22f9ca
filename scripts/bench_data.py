#!/usr/bin/env python3
"""Measures the data pipeline as docs/data.md quotes it: text rules and duplicates of `vilg data filter`, the time and
memory to open the index of 145,000 shards, and reading codes. See bench_data.sh."""
import io
import itertools
import json
import pathlib
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time

import PIL.Image
import PIL.ImageOps

PLANTED = {  # copies of an image, by name
    "exact": lambda image: encoded(image),
    "half size": lambda image: encoded(image.resize((image.width // 2, image.height // 2), PIL.Image.LANCZOS)),
    "JPEG, quality 30": lambda image: encoded(image, format="JPEG", quality=30),
    "70 % x 60 % size": lambda image: encoded(image.resize((image.width * 7 // 10, image.height * 6 // 10))),
}
MIRRORED = "mirrored"  # kept, unless --mirrored
SCENES, COPIES = 1000, 200
ROWS, TABLES = 1_000_000, 10
SHARDS, SHARD_SIZE = 145_000, 512 << 10


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **{"format": "PNG", **options})
    return file.getvalue()


def samples(folder):
    """Image bytes and JSON of the samples of a folder of shards, in order."""
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            images = {}
            for member in tar:
                key, extension = member.name.split(".", 1)
                if extension in ("png", "jpg"):
                    images[key] = tar.extractfile(member).read()
                elif extension == "json":
                    yield images.pop(key), json.load(tar.extractfile(member))


def run(*command):
    """Seconds, peak memory in MB and stdout of a command."""
    with tempfile.TemporaryFile("w+") as out:
        start, peak = time.perf_counter(), 0
        # wait4's peak would count this process too, from which the child is made.
        with subprocess.Popen(list(map(str, command)), stdout=out) as child:
            while child.poll() is None:
                status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
                peak = max([peak, *map(int, re.findall(r"VmHWM:\s+(\d+)", status))])
                time.sleep(0.01)
        seconds = time.perf_counter() - start
        if child.returncode:
            sys.exit(f"error: {' '.join(map(str, command))}")
        out.seek(0)
        return seconds, peak >> 10, out.read()


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def text_rules(vilg, scenes, work):
    captions = [caption for _, sample in samples(scenes) for caption in sample["captions"]]
    (work / "rows").mkdir()
    for table in range(TABLES):
        with open(work / "rows" / f"{table}.jsonl", "w", encoding="utf-8") as file:
            for row in range(table, ROWS, TABLES):
                line = {"url": f"{row}.png", "caption": captions[row % len(captions)]}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    seconds, memory, _ = run(vilg, "data", "filter", "-q", work / "rows", "-o", work / "kept", "--text-only")
    print(f"text rules: {ROWS:,} rows in {seconds:.1f} s and {memory} MB: {ROWS / seconds:,.0f} rows/s", flush=True)


def duplicates(vilg, scenes, work):
    copies = PLANTED | {MIRRORED: lambda image: encoded(PIL.ImageOps.mirror(image))}
    found = [image for image, _ in itertools.islice(samples(scenes), SCENES)]
    with tarfile.open(work / "planted.tar", "w") as tar:
        for number, image in enumerate(found):
            add(tar, f"scene-{number}.png", image)
            add(tar, f"scene-{number}.txt", "风景".encode())
        for kind, copy in enumerate(copies.values()):
            for number in range(COPIES):
                data = copy(PIL.Image.open(io.BytesIO(found[number + kind * COPIES])).convert("RGB"))
                extension = "jpg" if data.startswith(b"\xff\xd8") else "png"
                add(tar, f"z{kind}-{number}.{extension}", data)
                add(tar, f"z{kind}-{number}.txt", "风景".encode())
    print(f"| `--image-distance` | {' | '.join(copies)} | wrong, of {SCENES:,} | recall | precision |")
    for distance, more in [(0, []), (2, []), (4, []), (6, []), (4, ["--mirrored"])]:
        output = work / f"unique-{distance}{len(more)}"
        run(vilg, "data", "filter", "-q", work / "planted.tar", "-o", output, "--image-distance", distance, "--max-caption-repeats", 0, *more)
        with tarfile.open(output / "planted.tar") as tar:
            kept = [name for name in tar.getnames() if name.endswith(".txt")]
        found_copies = [COPIES - sum(name.startswith(f"z{kind}-") for name in kept) for kind in range(len(copies))]
        wrong = SCENES - sum(name.startswith("scene-") for name in kept)
        wanted = found_copies if more else found_copies[:-1]
        wrong += sum(found_copies) - sum(wanted)
        right = sum(wanted)
        print(f"| {' '.join([str(distance), *more])} | {' | '.join(map(str, found_copies))} | {wrong} | {right / COPIES / len(wanted):.0%} | "
              f"{right / (right + wrong):.0%} |", flush=True)


def codes_of_demo(vilg, work):
    """codes.json of shards for the demo's tokenizer."""
    (work / "one").mkdir()
    PIL.Image.new("RGB", (64, 64)).save(work / "one" / "a.png")
    (work / "one" / "a.txt").write_text("黑色", encoding="utf-8")
    run(vilg, "data", "encode", "-q", work / "one", "--model", "demo", "-o", work / "one-codes")
    return json.loads((work / "one-codes" / "codes.json").read_text())


def large_index(vilg, work, codes):
    """Sparse shards of 1,000 samples, and their index in the format of src/data/index.rs."""
    folder = work / "paper"
    folder.mkdir()
    shards = []
    for number in range(SHARDS):
        path = folder / f"{number:06}.tar"
        with open(path, "wb") as file:
            file.truncate(SHARD_SIZE)
        shards.append({"name": path.name, "size": SHARD_SIZE, "modified": path.stat().st_mtime_ns, "samples": 1000,
                       "first": number * 1000})
    table = json.dumps(shards).encode()
    with open(folder / ".shards.index", "wb") as file:
        file.write(b"vilgidx1")
        file.seek(8 + 8000 * SHARDS)
        file.write(table + struct.pack("<Q", len(table)) + b"vilgidx1")
    (folder / "codes.json").write_text(json.dumps(codes))
    config = work / "paper.toml"
    config.write_text(f'extends = "emoji"\n[[data.sources]]\npath = "{folder}"\n[text]\nvocab = "demo"\n'
                      '[image_tokenizer]\npath = "demo"\n')
    seconds, memory, _ = run(vilg, "train", "--config", config, "--dry-run")
    print(f"index of {SHARDS:,} shards: {seconds:.2f} s and {memory} MB", flush=True)


def codes_per_second(vilg, work, codes):
    """100,000 samples of 256 codes in 100 shards."""
    folder = work / "codes"
    folder.mkdir()
    (folder / "codes.json").write_text(json.dumps({**codes, "grid": [16, 16]}))
    header = "{'descr': '<u2', 'fortran_order': False, 'shape': (16, 16), }".ljust(117) + "\n"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(512)
    for shard in range(100):
        with tarfile.open(folder / f"{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(1000):
                add(tar, f"{sample:06}.npy", npy)
                add(tar, f"{sample:06}.txt", "清晨的海边，左边有一只海龟，左上方有一朵白云".encode())
    for workers in (1, 2):
        *_, out = run(vilg, "bench", "data", folder, "--workers", workers, "--samples", 50_000, "--repeat", 5, "--json")
        for order in json.loads(out)["orders"]:
            print(f"codes, {workers} worker(s), {order['order']}: {order['samples_per_second']:,.0f} samples/s", flush=True)


def main(vilg, scenes, work):
    codes = codes_of_demo(vilg, work)
    codes_per_second(vilg, work, codes)
    large_index(vilg, work, codes)
    text_rules(vilg, scenes, work)
    duplicates(vilg, scenes, work)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="vilg-bench-data-") as folder:
        main(*map(pathlib.Path, sys.argv[1:]), pathlib.Path(folder))
