#!/usr/bin/env python3
"""Makes tests/golden/ema_codebook.safetensors: two training steps of lucidrains' VectorQuantize from counts that are not 0;
some codes are chosen by nobody.

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors vector-quantize-pytorch
    venv/bin/python scripts/golden_ema_codebook.py tests/golden/ema_codebook.safetensors
"""
import sys
from importlib.metadata import version

import torch
from safetensors.torch import save_file
from vector_quantize_pytorch import VectorQuantize

NAMES = {"weight": "embed", "cluster_size": "cluster_size", "embed_avg": "embed_avg"}


def main():
    torch.manual_seed(6)
    torch.set_num_threads(1)
    q = VectorQuantize(6, 16, decay=0.9, eps=1e-5, commitment_weight=0.25, rotation_trick=False)
    book = q._codebook

    def state():
        return {f"embedding.{ours}": getattr(book, theirs)[0].clone() for ours, theirs in NAMES.items()}

    book.embed.data.normal_()
    book.cluster_size.data.uniform_(0.5, 2.0)
    book.embed_avg.data.copy_(book.embed * book.cluster_size[..., None])
    out = state()
    for step in (1, 2):
        z = (1.5 * torch.randn(2, 4, 6)).requires_grad_()
        c = torch.randn(2, 4, 6)
        z_q, codes, loss = q(z)
        ((z_q * c).sum() + loss.sum()).backward()
        found = {"z": z, "c": c, "z_q": z_q, "loss": loss.sum(), "codes": codes.float(), "gradient.z": z.grad} | state()
        out |= {f"{step}.{name}": tensor.detach().clone() for name, tensor in found.items()}
        print(loss, sorted(codes.unique().tolist()), file=sys.stderr)
    metadata = {name: version(name) for name in ("torch", "vector-quantize-pytorch")}
    save_file({k: v.detach().contiguous() for k, v in out.items()}, sys.argv[1], metadata)


if __name__ == "__main__":
    main()
