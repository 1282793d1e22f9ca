#!/usr/bin/env python3
"""Writes tests/golden/end_to_end.safetensors: losses and gradients of a tiny end-to-end generator in PyTorch.

The transformer is that of golden_transformer.py, the reconstructor is the decoder of taming-transformers itself, and the map
between them is written out here. The file holds random weights under vilg's names (`weight.NAME`), a batch (`text`,
`text_lengths`, `codes`, `pixels`) and, for both choices of the hidden state (`input.` and `predict.`), both losses
(`generation`, `reconstruction`), the pixels (`reconstructed`) and the gradient of the summed loss for every parameter
(`gradient.NAME`; of the reconstructor in two bytes, to keep the file small).

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors einops
    venv/bin/pip install --no-deps taming-transformers-rom1504
    venv/bin/python scripts/golden_end_to_end.py
"""

import pathlib

import golden_transformer as transformer
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from taming.modules.diffusionmodules.model import Decoder

transformer.HEIGHT = transformer.WIDTH = 4
transformer.CODES = 16
VARIANT = transformer.VARIANTS["plain"]
CODE_DIM, WIDTH, Z = 3, 10, 8
RECONSTRUCTOR = "end_to_end.reconstructor."
L1, L2 = 0.7, 1.0


def decoder():
    config = dict(ch=32, out_ch=3, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=[], in_channels=3, dropout=0.0)
    modules = torch.nn.ModuleDict(dict(
        post_quant_conv=torch.nn.Conv2d(CODE_DIM, Z, 1), decoder=Decoder(**config, resolution=8, z_channels=Z)
    ))
    with torch.no_grad():
        for name, p in modules.named_parameters():
            if "norm" in name:  # fresh norms change nothing: a swapped one would not show
                p.add_(0.2 * torch.randn_like(p))
            p.copy_(p.half())  # stored in two bytes
    return modules.double()


def losses(p, modules, hidden, batch, pixels):
    """Generation loss, reconstruction loss and reconstructed pixels."""
    text, lengths, codes = batch
    x = transformer.states(VARIANT, p, True, text, lengths, codes, reads_last=hidden == "input")
    logits = transformer.linear(p, "image_head", transformer.layer_norm(p, "norm", x[:, transformer.MAX_TEXT :][:, :16]))
    generation = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    first = transformer.MAX_TEXT + (hidden == "input")
    read = transformer.layer_norm(p, "end_to_end.map.norm", x[:, first : first + 16])
    inner = F.gelu(transformer.linear(p, "end_to_end.map.fc1", read), approximate="tanh")
    z_emb = transformer.linear(p, "end_to_end.map.fc2", inner).view(-1, 4, 4, CODE_DIM).permute(0, 3, 1, 2)
    y = modules["decoder"](modules["post_quant_conv"](z_emb)).permute(0, 2, 3, 1)
    return generation, L1 * (y - pixels).abs().mean() + L2 * (y - pixels).pow(2).mean(), y


def main():
    torch.manual_seed(20211231)
    torch.set_num_threads(1)
    lengths = [7, 3]
    text = torch.zeros(len(lengths), transformer.MAX_TEXT, dtype=torch.long)
    for row, length in zip(text, lengths):
        row[:length] = torch.randint(4, transformer.VOCAB, (length,))
        row[0], row[length - 1] = 2, 3
    codes = torch.randint(0, transformer.CODEBOOK, (len(lengths), transformer.CODES))
    pixels = (torch.rand(len(lengths), 8, 8, 3) * 2 - 1).double()
    out = {"text": text, "text_lengths": torch.tensor(lengths), "codes": codes, "pixels": pixels.float()}

    shapes = transformer.shapes(VARIANT) | {
        "end_to_end.map.norm.weight": (transformer.HIDDEN,),
        "end_to_end.map.norm.bias": (transformer.HIDDEN,),
        "end_to_end.map.fc1.weight": (WIDTH, transformer.HIDDEN),
        "end_to_end.map.fc1.bias": (WIDTH,),
        "end_to_end.map.fc2.weight": (CODE_DIM, WIDTH),
        "end_to_end.map.fc2.bias": (CODE_DIM,),
    }
    p = {}
    for name, shape in shapes.items():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p[name] = (centre + 0.2 * torch.randn(shape)).half().double().requires_grad_()
    modules = decoder()
    named = p | {RECONSTRUCTOR + name: t for name, t in modules.named_parameters()}
    out |= {f"weight.{name}": t.detach().half() for name, t in named.items()}
    for hidden in ["input", "predict"]:
        for t in named.values():
            t.grad = None
        generation, reconstruction, y = losses(p, modules, hidden, (text, lengths, codes), pixels)
        (generation + reconstruction).backward()
        out |= {f"{hidden}.generation": generation, f"{hidden}.reconstruction": reconstruction}
        out[f"{hidden}.reconstructed"] = y.float()
        for name, t in named.items():
            if t.grad is not None:  # none for the text head
                out[f"{hidden}.gradient.{name}"] = t.grad.half() if name.startswith(RECONSTRUCTOR) else t.grad.float()
        print(hidden, generation.item(), reconstruction.item())
    path = pathlib.Path(__file__).resolve().parent.parent / "tests/golden/end_to_end.safetensors"
    save_file({name: t.detach().contiguous() for name, t in out.items()}, path, {"torch": torch.__version__})
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
