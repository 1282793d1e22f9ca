#!/usr/bin/env python3
"""Makes tests/golden/taming_gumbel.safetensors: codes, vectors, divergence and gradients of taming-transformers'
GumbelQuantize, with the noise that it drew.

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors einops
    venv/bin/pip install --no-deps taming-transformers-rom1504
    venv/bin/python scripts/golden_gumbel.py tests/golden/taming_gumbel.safetensors
"""
import sys
from importlib.metadata import version

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from taming.modules.vqvae.quantize import GumbelQuantize


def main():
    torch.manual_seed(5)
    torch.set_num_threads(1)
    q = GumbelQuantize(6, 6, 32, straight_through=True, kl_weight=5e-4)
    z = (2 * torch.randn(2, 6, 4, 4)).requires_grad_()
    c = torch.randn(2, 6, 4, 4)
    noise = -torch.empty(2, 32, 4, 4).exponential_().log()

    def gumbel_softmax(logits, tau, dim, hard):
        soft = ((logits + noise) / tau).softmax(dim)
        index = soft.max(dim, keepdim=True)[1]
        chosen = torch.zeros_like(logits).scatter_(dim, index, 1.0)
        return chosen - soft.detach() + soft

    F.gumbel_softmax = gumbel_softmax
    z_q, kl, (_, _, codes) = q(z, temp=0.9)
    ((z_q * c).sum() + kl).backward()
    q.eval()
    with torch.no_grad():
        eval_codes = q.proj(z).argmax(1)
        eval_z_q = q.embed(eval_codes).permute(0, 3, 1, 2)
    out = {"z": z, "c": c, "noise": noise, "z_q": z_q, "kl": kl, "codes": codes.float(), "gradient.z": z.grad,
           "eval_codes": eval_codes.float(), "eval_z_q": eval_z_q}
    out |= {name: p for name, p in q.named_parameters()}
    out |= {"gradient." + name: p.grad for name, p in q.named_parameters()}
    metadata = {"torch": torch.__version__, "taming-transformers-rom1504": version("taming-transformers-rom1504")}
    save_file({k: v.detach().contiguous() for k, v in out.items()}, sys.argv[1], metadata)
    print(kl, codes.unique().numel(), file=sys.stderr)


if __name__ == "__main__":
    main()
