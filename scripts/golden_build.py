#!/usr/bin/env python3
"""Makes tests/golden/build/: small data sets in the formats that `vilg data build` reads, written by the tools that
define them, and `expected.json` with the digest of each image and its captions. Captions and drawings are made here.

    python3 -m venv venv && venv/bin/pip install img2dataset==1.47.0 pycocotools==2.0.11 lmdb==3.0.0 pillow==13.0.0
    venv/bin/pip install --no-deps cn-clip==1.6.0
    venv/bin/python scripts/golden_build.py tests/golden/build

img2dataset downloads from a server on the loopback interface; one of its URLs is missing on the server. COCO's JSON is
loaded with pycocotools and Chinese-CLIP's files with its build_lmdb_dataset.py, and both are compared with what was
written. No public tool writes the forms of AIC-ICC, COCO-CN and FM-IQA: these follow the readers that are published.
"""
import base64
import functools
import hashlib
import http.server
import io
import json
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import distribution, version
from pathlib import Path

import img2dataset
import lmdb
import pandas
import pyarrow
import pyarrow.parquet
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

CAPTIONS = [["一只红色的猫坐在窗台上", "窗台上有一只猫"], ["两个人在海边散步", "海边，两个人"], ["一辆绿色的公共汽车"], ["夜晚的街道"]]
IDS = [550529, 42, 1000, 7]


def drawing(index):
    """A drawing, as JPEG, or PNG for the last one."""
    image = Image.new("RGB", (24 + 4 * index, 20), (40 * index, 90, 160))
    ImageDraw.Draw(image).ellipse([4, 4, 14, 14], fill=(240, 60 * index, 20))
    out = io.BytesIO()
    image.save(out, "PNG" if index == 3 else "JPEG", quality=90)
    return out.getvalue()


IMAGES = [drawing(index) for index in range(4)]


def coco_names():
    return [f"COCO_val2014_{number:012}.{'png' if n == 3 else 'jpg'}" for n, number in enumerate(IDS)]


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False))


def coco(out):
    images = [{"id": i, "file_name": name, "height": 20, "width": 24 + 4 * n, "license": 1}
              for n, (i, name) in enumerate(zip(IDS, coco_names()))]
    annotations = [{"id": 10 * n + k, "image_id": IDS[n], "caption": text} for n, texts in enumerate(CAPTIONS) for k, text in enumerate(texts)]
    write_json(out / "captions_val2014.json", {"info": {"description": "drawings"}, "licenses": [{"id": 1, "name": "CC0"}],
                                               "images": images, "annotations": annotations})
    loaded = COCO(out / "captions_val2014.json")
    for n, number in enumerate(IDS):
        assert loaded.loadImgs(number)[0]["file_name"] == coco_names()[n]
        assert [a["caption"] for a in loaded.loadAnns(loaded.getAnnIds(imgIds=[number]))] == CAPTIONS[n]


def community(out):
    rows = [{"url": f"http://example.org/{n}", "image_id": name, "caption": CAPTIONS[n]} for n, name in enumerate(coco_names())]
    write_json(out / "caption_train_annotations_20170902.json", rows)
    lines = [f"{Path(name).stem}#{k}\t{text}" for n, name in enumerate(coco_names()) for k, text in enumerate(CAPTIONS[n])]
    (out / "imageid.human-written-caption.txt").write_text("\n".join(lines) + "\n")
    lines = [f"{Path(name).stem}#zhb#{k} {text}" for n, name in enumerate(coco_names()) for k, text in enumerate(CAPTIONS[n])]
    (out / "flickr-form.txt").write_text("\n".join(lines) + "\n")
    ask = [{"image_id": str(IDS[0]), "Question": "猫是什么颜色的？", "Answer": "红色。", "question_id": 1},
           {"image_id": str(IDS[1]), "Question": "有几个人？", "Answer": "两个。", "question_id": 2},
           {"image_id": str(IDS[0]), "Question": "猫在哪里？", "Answer": "窗台上。", "question_id": 3}]
    write_json(out / "FM-CH-QA.json", {"train": ask, "val": [{"image_id": str(IDS[3]), "Question": "现在是什么时候？", "Answer": "夜晚。", "question_id": 4}]})


def chinese_clip(out):
    with open(out / "train_imgs.tsv", "w") as file:
        for number, image in zip(IDS, IMAGES):
            file.write(f"{number}\t{base64.urlsafe_b64encode(image).decode()}\n")
    with open(out / "train_texts.jsonl", "w") as file:
        for number, (text, images) in enumerate([(CAPTIONS[0][0], [IDS[0]]), (CAPTIONS[1][0], [IDS[1]]), (CAPTIONS[0][1], [IDS[0]]),
                                                 ("一张图画", [IDS[2], IDS[3]])]):
            file.write(json.dumps({"text_id": number, "text": text, "image_ids": images}, ensure_ascii=False) + "\n")
    script = distribution("cn-clip").locate_file("cn_clip/preprocess/build_lmdb_dataset.py")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, script, "--data_dir", out, "--splits", "train", "--lmdb_dir", folder], check=True, capture_output=True)
        with lmdb.open(f"{folder}/train/imgs", readonly=True).begin() as images:
            assert int(images.get(b"num_images")) == 4
            for number, image in zip(IDS, IMAGES):
                assert base64.urlsafe_b64decode(images.get(str(number).encode())) == image
        with lmdb.open(f"{folder}/train/pairs", readonly=True).begin() as pairs:
            assert int(pairs.get(b"num_samples")) == 5
            assert pickle.loads(pairs.get(b"0")) == (IDS[0], 0, CAPTIONS[0][0])


def downloaded(out):
    with tempfile.TemporaryDirectory() as folder:
        served = Path(folder, "served")
        served.mkdir()
        for n, image in enumerate(IMAGES):
            (served / f"{n}.jpg").write_bytes(image)

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=served))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{n}.jpg" for n in (0, 1, 9, 2)]
        texts = [CAPTIONS[0][0], CAPTIONS[1][0], "不存在的图片", CAPTIONS[2][0]]
        pandas.DataFrame({"url": urls, "caption": texts}).to_parquet(f"{folder}/urls.parquet")
        img2dataset.download(url_list=f"{folder}/urls.parquet", input_format="parquet", url_col="url", caption_col="caption",
                             output_folder=f"{folder}/img2dataset", output_format="webdataset", processes_count=1, thread_count=1,
                             resize_mode="no", number_sample_per_shard=2, compute_hash=None, extract_exif=False)
        (out / "img2dataset").mkdir()
        for file in sorted(Path(folder, "img2dataset").iterdir()):
            if file.suffix in (".tar", ".parquet") or file.name.endswith("_stats.json"):
                shutil.copy(file, out / "img2dataset")


def tables(out):
    image = lambda n: {"bytes": IMAGES[n], "path": None}
    table = pyarrow.table({"id": pyarrow.array(IDS), "image": [IMAGES[n] for n in range(4)], "picture": [image(n) for n in range(4)],
                           "captions": CAPTIONS, "score": [0.5, 0.25, 1.0, None]})
    pyarrow.parquet.write_table(table, out / "pairs.parquet")
    frame = pandas.DataFrame({"key": IDS, "file": coco_names(), "zh": [texts[0] for texts in CAPTIONS], "zh2": [texts[-1] for texts in CAPTIONS]})
    frame.to_csv(out / "pairs.csv", index=False)


def main():
    out = Path(sys.argv[1]).resolve()
    shutil.rmtree(out, ignore_errors=True)
    (out / "images").mkdir(parents=True)
    for name, image in zip(coco_names(), IMAGES):
        (out / "images" / name).write_bytes(image)
    for make in (coco, community, chinese_clip, downloaded, tables):
        make(out)
    images = [{"image_id": str(i), "name": name, "sha256": hashlib.sha256(image).hexdigest(), "captions": texts}
              for i, name, image, texts in zip(IDS, coco_names(), IMAGES, CAPTIONS)]
    tools = ["img2dataset", "pycocotools", "cn-clip", "lmdb", "pyarrow", "pandas", "webdataset", "Pillow"]
    write_json(out / "expected.json", {"images": images, "versions": {tool: version(tool) for tool in tools}})


if __name__ == "__main__":
    main()
