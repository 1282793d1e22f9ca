#!/usr/bin/env python3
"""Writes tests/golden/transformer.safetensors: outputs of a tiny generator in PyTorch.

A formulation of its own, sharing no code with vilg: full n x n masks written out from the paper's rules, stock PyTorch layers'
functions, autograd, torch.optim.AdamW. The file holds random weights under vilg's names (`weight.NAME`), two batches
(`text`, `text_lengths`, `codes`), the logits of both directions, the gradient of the summed loss for every parameter
(`gradient.NAME`) and the losses of 10 training steps (`losses`), for two variants of the model (`plain.` and `options.`).

Needs torch, numpy and safetensors. Run: python3 scripts/golden_transformer.py
"""

import json
import pathlib
import platform

import numpy
import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

HIDDEN, HEADS, MLP, VOCAB, CODEBOOK = 32, 4, 2, 23, 17
HEIGHT, WIDTH, MAX_TEXT = 3, 5, 7
CODES = HEIGHT * WIDTH
# An optimizer setting in which every part has an effect: the gradient norm exceeds CLIP at first.
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP, STEPS = 3e-3, (0.9, 0.96), 1e-8, 0.2, 1.5, 10

VARIANTS = {
    # layers 1 row, 2 column, 3 row, 4 conv
    "plain": dict(layers=4, conv_size=3, row="window", border="clip", qk_norm=False, sandwich_norm=False),
    # layers 1 row, 2 conv
    "options": dict(layers=2, conv_size=5, row="same-row", border="raster-wrap", qk_norm=True, sandwich_norm=True),
}


def shapes(v):
    """Every parameter's shape by name."""
    named = {
        "text_embedding.weight": (VOCAB, HIDDEN),
        "text_position.weight": (MAX_TEXT, HIDDEN),
        "image_embedding.weight": (CODEBOOK, HIDDEN),
        "image_row.weight": (HEIGHT, HIDDEN),
        "image_column.weight": (WIDTH, HIDDEN),
        "image_start": (HIDDEN,),
        "norm": HIDDEN,
        "text_head": (VOCAB, HIDDEN),
        "image_head": (CODEBOOK, HIDDEN),
    }
    for i in range(v["layers"]):
        block = {
            "norm1": HIDDEN,
            "attention.qkv": (3 * HIDDEN, HIDDEN),
            "attention.proj": (HIDDEN, HIDDEN),
            "norm2": HIDDEN,
            "mlp.fc1": (MLP * HIDDEN, HIDDEN),
            "mlp.fc2": (HIDDEN, MLP * HIDDEN),
        }
        if v["qk_norm"]:
            block |= {"attention.q_norm": HIDDEN // HEADS, "attention.k_norm": HIDDEN // HEADS}
        if v["sandwich_norm"]:
            block |= {"norm1_post": HIDDEN, "norm2_post": HIDDEN}
        named |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    result = {}
    for name, shape in named.items():
        if name == "image_start" or name.endswith(".weight"):
            result[name] = shape
        elif isinstance(shape, int):  # a norm
            result |= {f"{name}.weight": (shape,), f"{name}.bias": (shape,)}
        else:  # a linear layer
            result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def sees(v, layer, query, key, causal):
    """Whether the code at `query` attends to the code at `key` in this layer (counted from 1)."""
    if causal and key > query:
        return False
    (qr, qc), (kr, kc) = divmod(query, WIDTH), divmod(key, WIDTH)
    if layer == v["layers"]:
        reach = v["conv_size"] // 2
        if v["border"] == "clip":
            return abs(qr - kr) <= reach and abs(qc - kc) <= reach
        offsets = {dr * WIDTH + dc for dr in range(-reach, reach + 1) for dc in range(-reach, reach + 1)}
        return key - query in offsets
    if layer % 4 == 2:
        return qc == kc
    if v["row"] == "same-row":
        return qr == kr
    return -WIDTH <= key - query <= WIDTH


def mask(v, layer, to_image, text_length, reads_last=False):
    """The full boolean mask of one sequence: [source | target]; `reads_last`: the last code of a target image is an input."""
    if to_image:
        kinds = [("text", i) for i in range(MAX_TEXT)] + [("start", 0)] + [("image", i) for i in range(CODES - 1 + reads_last)]
        source = MAX_TEXT
    else:
        kinds = [("image", i) for i in range(CODES)] + [("text", i) for i in range(MAX_TEXT - 1)]
        source = CODES
    weight = [0 if p < source else p - source + 1 for p in range(len(kinds))]
    full = torch.zeros(len(kinds), len(kinds), dtype=torch.bool)
    for q, (q_kind, q_index) in enumerate(kinds):
        for k, (k_kind, k_index) in enumerate(kinds):
            allowed = weight[k] <= weight[q]
            if to_image and k_kind == "text" and k_index >= text_length:
                allowed = False
            if q_kind == "image" and k_kind == "image":
                allowed = allowed and sees(v, layer, q_index, k_index, causal=to_image)
            full[q, k] = allowed
    return full


def layer_norm(p, name, x):
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)


def linear(p, name, x):
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def attention(p, name, x, masks):
    b, l, _ = x.shape
    q, k, v = linear(p, f"{name}.qkv", x).view(b, l, 3, HEADS, HIDDEN // HEADS).permute(2, 0, 3, 1, 4)
    if f"{name}.q_norm.weight" in p:
        q, k = layer_norm(p, f"{name}.q_norm", q), layer_norm(p, f"{name}.k_norm", k)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=masks[:, None])
    return linear(p, f"{name}.proj", out.transpose(1, 2).reshape(b, l, HIDDEN))


def states(v, p, to_image, text, lengths, codes, reads_last=False):
    """Hidden states of the last layer, before the final norm."""
    b = text.shape[0]
    places = torch.arange(CODES)
    text_x = p["text_embedding.weight"][text] + p["text_position.weight"]
    image_x = p["image_embedding.weight"][codes]
    image_x = image_x + p["image_row.weight"][places // WIDTH] + p["image_column.weight"][places % WIDTH]
    if to_image:
        x = torch.cat([text_x, p["image_start"].expand(b, 1, HIDDEN), image_x if reads_last else image_x[:, :-1]], 1)
    else:
        x = torch.cat([image_x, text_x[:, :-1]], 1)
    for i in range(v["layers"]):
        masks = torch.stack([mask(v, i + 1, to_image, n, reads_last) for n in lengths])
        branch = attention(p, f"blocks.{i}.attention", layer_norm(p, f"blocks.{i}.norm1", x), masks)
        x = x + (layer_norm(p, f"blocks.{i}.norm1_post", branch) if v["sandwich_norm"] else branch)
        branch = F.gelu(linear(p, f"blocks.{i}.mlp.fc1", layer_norm(p, f"blocks.{i}.norm2", x)), approximate="tanh")
        branch = linear(p, f"blocks.{i}.mlp.fc2", branch)
        x = x + (layer_norm(p, f"blocks.{i}.norm2_post", branch) if v["sandwich_norm"] else branch)
    return x


def logits(v, p, to_image, text, lengths, codes):
    x = layer_norm(p, "norm", states(v, p, to_image, text, lengths, codes))
    return linear(p, "image_head", x[:, MAX_TEXT:]) if to_image else linear(p, "text_head", x[:, CODES:])


def loss(v, p, batch):
    """Mean over predicted codes plus mean over predicted tokens."""
    text, lengths, codes = batch
    image = F.cross_entropy(logits(v, p, True, *batch).flatten(0, 1), codes.flatten())
    targets = text[:, 1:].clone()
    for row, length in zip(targets, lengths):
        row[length - 1 :] = -100
    words = F.cross_entropy(logits(v, p, False, *batch).flatten(0, 1), targets.flatten(), ignore_index=-100)
    return image + words


def decays(name, tensor):
    """Weight decay is for matrices; embeddings, positions, norms and biases have none."""
    tables = ("text_embedding", "text_position", "image_embedding", "image_row", "image_column")
    return tensor.dim() >= 2 and not name.startswith(tables)


def main():
    torch.manual_seed(20211231)
    torch.set_num_threads(1)
    lengths = [7, 4, 2]
    text = torch.zeros(len(lengths), MAX_TEXT, dtype=torch.long)
    for row, length in zip(text, lengths):
        row[:length] = torch.randint(4, VOCAB, (length,))
        row[0], row[length - 1] = 2, 3
    codes = torch.randint(0, CODEBOOK, (len(lengths), CODES))
    batch = (text, lengths, codes)
    out = {
        "text": text.to(torch.int64),
        "text_lengths": torch.tensor(lengths, dtype=torch.int64),
        "codes": codes.to(torch.int64),
    }
    for variant, v in VARIANTS.items():
        p = {}
        for name, shape in shapes(v).items():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            # float32 values, so that both sides start from the same numbers; the arithmetic here is float64.
            p[name] = (centre + 0.2 * torch.randn(shape)).float().double().requires_grad_()
            out[f"{variant}.weight.{name}"] = p[name].detach().float().clone()
        out[f"{variant}.logits.image"] = logits(v, p, True, *batch).detach()
        out[f"{variant}.logits.text"] = logits(v, p, False, *batch).detach()
        decayed = [t for name, t in p.items() if decays(name, t)]
        others = [t for name, t in p.items() if not decays(name, t)]
        groups = [dict(params=decayed, weight_decay=WEIGHT_DECAY), dict(params=others, weight_decay=0.0)]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS)
        losses, norms = [], []
        for step in range(STEPS):
            optimizer.zero_grad()
            value = loss(v, p, batch)
            value.backward()
            if step == 0:
                out |= {f"{variant}.gradient.{name}": t.grad.clone() for name, t in p.items()}
            losses.append(value.item())
            norms.append(torch.nn.utils.clip_grad_norm_(list(p.values()), CLIP).item())
            optimizer.step()
        assert norms[0] > CLIP, norms
        out[f"{variant}.losses"] = torch.tensor(losses, dtype=torch.float64)
        print(variant, [f"{x:.4f}" for x in losses], [f"{x:.2f}" for x in norms])
    out = {k: (t.float() if t.dtype == torch.float64 and "losses" not in k else t).contiguous() for k, t in out.items()}
    settings = dict(
        hidden=HIDDEN, heads=HEADS, mlp_ratio=MLP, vocab=VOCAB, codebook=CODEBOOK, grid=[HEIGHT, WIDTH], max_text=MAX_TEXT,
        learning_rate=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, clip=CLIP, variants=VARIANTS,
    )
    metadata = {
        "torch": torch.__version__, "numpy": numpy.__version__, "safetensors": safetensors.__version__,
        "python": platform.python_version(), "script": "scripts/golden_transformer.py", "settings": json.dumps(settings),
    }
    path = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/transformer.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(out, path, metadata)
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
