#!/usr/bin/env python3
"""Makes tests/golden/taming_vqgan.safetensors: a small random VQGAN of taming-transformers itself, what it
answers for two images, and what PyTorch's autograd says of its losses.

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors einops
    venv/bin/pip install --no-deps taming-transformers-rom1504
    venv/bin/python scripts/golden_taming.py tests/golden/taming_vqgan.safetensors
"""
import json
import sys
from importlib.metadata import version

import torch
from safetensors.torch import save_file
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer2

CONFIG = dict(ch=32, out_ch=3, ch_mult=(2, 1), num_res_blocks=1, attn_resolutions=[8], in_channels=3,
              resolution=16, z_channels=16, dropout=0.0)
CODES, DIM, BETA = 64, 6, 0.25


def model():
    parts = torch.nn.ModuleDict(dict(
        encoder=Encoder(**CONFIG, double_z=False),
        quant_conv=torch.nn.Conv2d(CONFIG["z_channels"], DIM, 1),
        quantize=VectorQuantizer2(CODES, DIM, beta=BETA, legacy=False),
        post_quant_conv=torch.nn.Conv2d(DIM, CONFIG["z_channels"], 1),
        decoder=Decoder(**CONFIG),
    ))
    with torch.no_grad():
        for name, p in parts.named_parameters():
            if "norm" in name:  # fresh norms are the identity: a swapped one would not show
                p.add_(0.2 * torch.randn_like(p))
            p.copy_(p.half())  # stored in two bytes
    return parts


def main():
    torch.manual_seed(7)
    torch.set_num_threads(1)
    m = model()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        z = m["quant_conv"](m["encoder"](x))
        rows = z.permute(0, 2, 3, 1).reshape(-1, DIM)
        # Codes among the latents, so that many of them are used.
        book = rows[torch.randperm(len(rows))[:CODES]] + 0.1 * rows.std() * torch.randn(CODES, DIM)
        m["quantize"].embedding.weight.copy_(book.half())

    z = m["quant_conv"](m["encoder"](x))
    z_q, codebook_loss, (_, _, codes) = m["quantize"](z)
    y = m["decoder"](m["post_quant_conv"](z_q))
    loss = (y - x).abs().mean() + (y - x).pow(2).mean() + codebook_loss
    loss.backward()
    m["quantize"].legacy = True
    legacy_loss = m["quantize"](z)[1]

    out = {name: p.detach().half() for name, p in m.named_parameters()}
    out |= {"golden.x": x, "golden.z": z, "golden.codes": codes.float(), "golden.y": y, "golden.loss": loss,
            "golden.codebook_loss": codebook_loss, "golden.legacy_loss": legacy_loss}
    for name, p in m.named_parameters():
        g = p.grad.flatten()
        # Two numbers that depend on position and sign replace the whole gradient, to save space.
        waves = torch.cos(torch.arange(len(g), dtype=torch.float64) % 1000)
        out["golden.gradient." + name] = torch.stack([g.double().norm(), (g.double() * waves).sum()])
    metadata = {"config": json.dumps(CONFIG | dict(codes=CODES, dim=DIM, beta=BETA)), "torch": torch.__version__,
                "taming-transformers-rom1504": version("taming-transformers-rom1504")}
    save_file({k: v.detach().contiguous() for k, v in out.items()}, sys.argv[1], metadata)
    print(f"{codes.unique().numel()} codes chosen, loss {loss.item():.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
