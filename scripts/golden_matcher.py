#!/usr/bin/env python3
"""Makes tests/golden/chinese_clip/: what small random models of cn_clip and of transformers' ChineseCLIPModel answer for a
few texts and images.

    python3 -m venv venv && venv/bin/pip install torch torchvision transformers safetensors pillow==13.0.0 six timm lmdb
    venv/bin/pip install --no-deps cn_clip==1.6.0
    venv/bin/python scripts/golden_matcher.py tests/golden/chinese_clip

- `answers.safetensors`: images, preprocessed pixels, features and logits; in its metadata the texts with their ids, and
  the names and shapes of the models' tensors, which are filled by the formula of golden_weights.py
- `tiny.pt`: a checkpoint as cn_clip's training writes it, in half precision
- `vocab.txt`: the tokens of cn_clip's vocabulary that occur in the texts, and their single characters
- `config.json`: the configuration of the ChineseCLIPModel
"""
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import cn_clip.clip.utils as utils
import numpy as np
import torch
from cn_clip.clip.bert_tokenizer import FullTokenizer
from cn_clip.clip.model import CLIP, convert_state_dict, convert_weights
from golden_weights import hashed
from PIL import Image
from safetensors.torch import save_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel

# No word has more than 100 characters: that is [UNK] here and in transformers, but only from 201 on in cn_clip.
TEXTS = [
    "一只红色的猫坐在窗台上", "两个人在海边散步，夕阳西下。", "ＡＢＣ全角！１２３", "紅蘋果與綠色的樹", "A Photo of 3 dogs, 2008", "🐱猫咪😀",
    "", "  空 白\t和\n换行  ", "café naïve Ångström", "℃ ㎏ ½ ①", "[SEP]和[MASK]", "https://example.org/猫?x=1&y=2", "unaffable preprocessing",
    "ひらがなカタカナ", "“引号”——破折号…", "很长的句子" * 20, "x" * 90,
]
# Rows of different lengths, for the features.
ROWS = [0, 1, 4, 6, 15]


def smaller_vocabulary(tokenizer):
    """Of cn_clip's vocabulary: special tokens, the tokens of the texts, and each of their characters."""
    kept = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    for text in TEXTS:
        for token in tokenizer.tokenize(text):
            plain = token.removeprefix("##")
            kept |= {token} | {form for c in plain for form in (c, "##" + c) if form in tokenizer.vocab and token != "[UNK]"}
    # [PAD] is row 0, as in the whole vocabulary.
    return sorted(kept, key=tokenizer.vocab.get)


def weight(name, shape):
    if name.endswith("running_var"):
        return 1 + hashed(name, shape, 0.4).abs()
    if name == "logit_scale":
        return 2 + hashed(name, shape, 1.0)
    if len(shape) == 1:
        return hashed(name, shape, 0.4) + (1 if name.endswith(".weight") else 0)
    return hashed(name, shape, (24 / np.prod(shape[1:])) ** 0.5)


def filled(model):
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(weight(name, tuple(tensor.shape)))
    return model.eval()


def shapes(state):
    return {name: list(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}


def clip(vocab, tokenizer, vision, text):
    layers, width, side, patch = vision
    text_layers, hidden = text
    return CLIP(24, side, layers, width, patch, vocab, 0.1, "gelu", 0.1, hidden, 0.02, 4 * hidden, 60, hidden // 64, text_layers, 2,
                tokenizer=tokenizer)


def answers(model, pixels, ids):
    with torch.no_grad():
        logits = model.get_similarity(pixels, ids)[0]
        unit = lambda x: x / x.norm(dim=-1, keepdim=True)
        return {"images": unit(model.encode_image(pixels)), "texts": unit(model.encode_text(ids)), "logits": logits}


def hugging_face(folder, vocab):
    config = ChineseCLIPConfig(
        text_config=dict(vocab_size=vocab, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
                         max_position_embeddings=60),
        vision_config=dict(hidden_size=96, intermediate_size=384, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8,
                           projection_dim=24),
        projection_dim=24)
    model = filled(ChineseCLIPModel(config))
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        (folder / "config.json").write_bytes(Path(saved, "config.json").read_bytes())
    return model


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    vocab = smaller_vocabulary(utils._tokenizer)
    (folder / "vocab.txt").write_text("".join(token + "\n" for token in vocab))
    tokenizer = utils._tokenizer = FullTokenizer(str(folder / "vocab.txt"))
    all_ids = utils.tokenize(TEXTS)
    ids = all_ids[ROWS]

    random = np.random.default_rng(5)
    images = []
    for width, height in ((50, 40), (32, 32), (90, 30)):
        small = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        images.append(small.resize((width, height), Image.Resampling.BILINEAR))
    pixels = {side: torch.stack([utils.image_transform(side)(image) for image in images]) for side in (32, 64)}

    out = {f"picture.{i}": torch.from_numpy(np.array(image)).half() for i, image in enumerate(images)}
    out |= {f"pixels.{side}": values for side, values in pixels.items()}
    names = {}

    vit = filled(clip(len(vocab), tokenizer, (2, 128, 32, 8), (2, 128)))
    names["vit"], found = shapes(vit.state_dict()), answers(vit, pixels[32], ids)
    out |= {f"vit.{key}": value for key, value in found.items()}
    names["flash"] = shapes(convert_state_dict(dict(vit.state_dict())))

    resnet = filled(clip(len(vocab), tokenizer, ([1, 2, 1, 1], 16, 64, None), (3, 64)))
    names["resnet"], found = shapes(resnet.state_dict()), answers(resnet, pixels[64], ids)
    out |= {f"resnet.{key}": value for key, value in found.items()}

    tiny = filled(clip(len(vocab), tokenizer, (1, 64, 32, 8), (1, 64)))
    convert_weights(tiny)
    state = {"module." + name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    state["module.bert.pooler.dense.weight"] = torch.zeros(64, 64).half()
    state["module.bert.pooler.dense.bias"] = torch.zeros(64).half()
    torch.save({"epoch": 1, "step": 10, "name": "tiny", "state_dict": state, "optimizer": {"state": {0: {"step": torch.tensor(10.0)}}}},
               folder / "tiny.pt")
    out |= {f"tiny.{key}": value for key, value in answers(tiny.float(), pixels[32], ids).items()}

    hf = hugging_face(folder, len(vocab))
    names["hugging_face"] = shapes(hf.state_dict())
    with torch.no_grad():
        found = hf(input_ids=ids, pixel_values=pixels[32], attention_mask=(ids != 0).long())
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)
    out |= {"hugging_face.images": unit(found.image_embeds), "hugging_face.texts": unit(found.text_embeds),
            "hugging_face.logits": found.logits_per_image}

    metadata = {"texts": json.dumps(list(zip(TEXTS, all_ids.tolist()))), "rows": json.dumps(ROWS), "names": json.dumps(names)}
    metadata |= {tool: version(tool) for tool in ("torch", "torchvision", "pillow", "transformers", "cn-clip")}
    save_file({key: value.detach().contiguous() for key, value in out.items()}, folder / "answers.safetensors", metadata)
    print({key: value for key, value in out.items() if key.endswith("logits")}, len(vocab), file=sys.stderr)


if __name__ == "__main__":
    main()
