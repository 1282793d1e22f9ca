#!/usr/bin/env python3
"""Makes tests/golden/captions/: references.json and results.json in COCO's formats, and expected.json with the scores of
pycocoevalcap (BLEU, ROUGE-L, CIDEr-D), of its METEOR 1.5 jar, and of Vedantam's own CIDEr without clipping.

    python3 -m venv venv && venv/bin/pip install numpy==2.4.6
    venv/bin/pip install --no-deps pycocoevalcap==1.2
    git clone https://github.com/vrama91/cider
    venv/bin/python scripts/golden_caption_metrics.py tests/golden/captions cider    # needs Java for METEOR

Tokens are characters: captions go to the metrics with a blank after each character and without white space, past
pycocoevalcap's tokenizer, which is made for English. METEOR runs twice: `-m exact` is the metric that vilg has, and
`-norm` is pycocoevalcap's command line, which differs where there are Latin letters, digits or quotation marks.
"""
import json
import pathlib
import random
import subprocess
import sys
import types
from importlib.metadata import version

import numpy as np
import pycocoevalcap
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

ROOT = pathlib.Path(pycocoevalcap.__path__[0])
WHO = ["一个男人", "一位穿着红色外套的女人", "两个孩子", "一只棕色的小狗", "一群人", "戴帽子的老人", "一只猫"]
DOES = ["站在", "坐在", "走在", "奔跑在", "躺在"]
WHERE = ["绿色的草地上", "热闹的街道上", "海边的沙滩上", "窗台上", "公园的长椅上", "厨房里的餐桌旁"]
TAIL = ["", "。", "，旁边有一辆自行车。", "，天空是蓝色的！", "，手里拿着一把伞", "；远处有山、有树。"]
# Caption, references.
CASES = [
    ("", ["一只猫", "一只白猫", "窗台上的猫", "猫。", "小猫在睡觉"]),
    (" \t　", ["空白", "空 白", "", "空", "白"]),
    ("", ["", "", " ", "", ""]),
    ("猫", ["一只猫", "猫", "一只白猫在窗台上", "小猫。", "狗"]),
    ("猫", ["狗", "马", "鸟", "鱼", "虫"]),
    ("。", ["。", "，", "一只猫。", "！", "猫"]),
    ("月亮", ["月", "亮", "月亮", "亮月", "弯弯的月亮"]),
    ("一只猫坐在窗台上。", ["一只猫坐在窗台上。", "猫在窗台上", "一只猫，坐着", "窗台上有猫", "白猫"]),
    ("上台窗在坐猫只一", ["一只猫坐在窗台上"] * 5),
    ("的的的的的的", ["的", "的的", "红的绿的蓝的", "的的的的的的的的", "目的"]),
    ("红红的花，绿绿的草，红红的花，绿绿的草", ["绿绿的草，红红的花", "红红的花绿绿的草", "花红红的，草绿绿的，花红红的", "草，花，草，花", "红花绿草"]),
    ("白色的房子的旁边的树的下面的长椅的上面的猫的尾巴的尖的颜色的白色的",
     ["白色的尖的尾巴的猫的颜色的树的下面的旁边的长椅的上面的房子的", "的白的色的房的子的", "白色的房子旁边的树下面的长椅上面的猫",
      "猫的尾巴的颜色的白色的尖的上面的长椅的下面的树的旁边的房子的白色的", "树下的长椅上有一只白色尾巴的猫"]),
    ("人人人山山山海海海，人山人海，海上有山，山上有人，人在海边，海在山边，山在人边",
     ["人山人海，山在海边，人在山边，海在人边，海上有人，山上有海", "山山海海人人", "海边有人，人边有海，山边有海，海上有人，人上有山",
      "人在山上，山在海上，海在人上，人在海上，山在人上", "山海"]),
    ("ATM 取款机图标", ["ATM取款机", "atm 取款机的图标", "一台ATM机", "银行的取款机", "取款机 ATM"]),
    ("A cat sits on a mat.", ["a cat is on the mat.", "A cat, sitting on a mat", "one cat", "一只cat", "The cat sat."]),
    ("I see 2 cats (one is 'big')", ["i saw two cats", "2 cats - one big", "\"2 cats\"", "cats: 2", "$2 cats?"]),
    ("他说：“你好！”然后笑了…", ["“你好！”他说。", "他笑着说“你好”", "他说「你好」", "他——笑了", "他说:\"你好!\""]),
    ("价格 50％（打折）", ["打折５０％", "价格50%(打折)", "半价", "50％", "打五折（50％）"]),
    ("🐱和🐶在一起👍", ["🐶和🐱", "猫和狗在一起", "🐱🐶👍", "🐱在🐶旁", "两只动物"]),
    ("café́的招牌", ["cafe的招牌", "café招牌", "咖啡店的招牌", "招牌", "招牌的café́"]),
    ("㐀𠀀龘字", ["龘字", "𠀀㐀", "生僻字", "字", "㐀𠀀龘"]),
    ("a|||b ||| c", ["|||", "a|b|c", "a ||| b", "abc", "竖线|"]),
]


def cases():
    draw = random.Random(23)
    made = []
    for _ in range(26):
        who, does, where = draw.choice(WHO), draw.choice(DOES), draw.choice(WHERE)

        def caption(change):
            parts = [part if draw.random() > change else draw.choice(kind)
                     for part, kind in ((who, WHO), (does, DOES), (where, WHERE))]
            order = [1, 2, 0] if draw.random() < change else [0, 1, 2]
            return "".join(parts[i] for i in order) + draw.choice(TAIL)
        references = [caption(0.25) for _ in range(5)]
        made.append((caption(0.4), references))
    return CASES + made


def tokens(caption):
    return " ".join(c for c in caption if not c.isspace())


class Meteor:
    """The jar's dialogue: SCORE lines give the statistics of a segment, one EVAL line their scores and the total."""

    def __init__(self, options):
        command = ["java", "-Xmx2G", "-Duser.language=en", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en"]
        self.process = subprocess.Popen(command + options, cwd=ROOT / "meteor", stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def compute_score(self, references, results):
        stats = []
        for key, (caption,) in results.items():
            self.say(" ||| ".join(["SCORE", *references[key], caption]))
            stats.append(self.process.stdout.readline().strip())
        self.say(" ||| ".join(["EVAL", *stats]))
        scores = [float(self.process.stdout.readline()) for _ in range(len(stats) + 1)]
        self.process.stdin.close()
        return scores[-1], scores[:-1]


class PlainCider:
    """Vedantam's CIDEr, whose Python 2 is read as Python 3."""

    def __init__(self, repository):
        source = (pathlib.Path(repository) / "pyciderevalcap/cider/cider_scorer.py").read_text("utf-8")
        self.module = types.ModuleType("cider_scorer")
        for old, new in (("iteritems", "items"), ("xrange", "range"), ("import cPickle", "import pickle")):
            source = source.replace(old, new)
        exec(source, self.module.__dict__)

    def compute_score(self, references, results):
        scorer = self.module.CiderScorer(n=4)
        for key, (caption,) in results.items():
            scorer += (caption, references[key])
        return scorer.compute_score("corpus")


def main(folder, cider):
    # The first ids are integers as in COCO, the last ones texts as in AIC-ICC.
    made = cases()
    keys = [1000 + 7 * i if i < 30 else f"{i:02}a7.jpg" for i in range(len(made))]
    annotations = [{"id": 5 * i + n, "image_id": keys[i], "caption": text}
                   for n in range(5) for i, (_, texts) in enumerate(made) for text in [texts[n]]]
    results = [{"image_id": key, "caption": caption} for key, (caption, _) in zip(keys, made)]
    random.Random(1).shuffle(results)
    write(folder / "references.json", {"images": [{"id": key} for key in keys], "annotations": annotations})
    write(folder / "results.json", results)

    references = {key: [tokens(text) for text in texts] for key, (_, texts) in zip(keys, made)}
    captions = {key: [tokens(caption)] for key, (caption, _) in zip(keys, made)}
    scorers = {"ROUGE_L": Rouge(), "CIDEr": Cider(), "CIDEr_plain": PlainCider(cider),
               "METEOR": Meteor(["-m", "exact"]), "METEOR_norm": Meteor(["-norm"])}
    corpus, images = {}, {}
    total, each = Bleu(4).compute_score(references, captions, verbose=0)
    for n in range(4):
        corpus[f"Bleu_{n + 1}"], images[f"Bleu_{n + 1}"] = total[n], each[n]
    for name, scorer in scorers.items():
        corpus[name], images[name] = scorer.compute_score(references, captions)
    rounded = {name: [round(float(score), 9) for score in scores] for name, scores in images.items()}
    versions = {"pycocoevalcap": version("pycocoevalcap"), "numpy": np.__version__, "meteor": "1.5",
                "vrama91/cider": "f281464c60d496b8fabb89a7a8c120f655a3a2bd"}
    write(folder / "expected.json", {"versions": versions, "image_ids": keys, "images": rounded,
                                     "corpus": {name: float(score) for name, score in corpus.items()}})
    print(corpus, file=sys.stderr)


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2])
