#!/usr/bin/env python3
"""Makes tests/golden/contrastive.safetensors: the losses of open_clip (ClipLoss, SigLipLoss) and their gradients.

    python3 -m venv venv && venv/bin/pip install torch numpy safetensors packaging
    venv/bin/pip install --no-deps open_clip_torch
    venv/bin/python scripts/golden_contrastive.py tests/golden/contrastive.safetensors
"""
import importlib.util
import sys
from importlib.metadata import files, version

import torch
import torch.nn.functional as F
from safetensors.torch import save_file


def open_clip_losses():
    """The module alone: the package imports torchvision and timm."""
    path = next(f for f in files("open_clip_torch") if f.name == "loss.py").locate()
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    torch.manual_seed(7)
    torch.set_default_dtype(torch.float64)
    images, texts = (F.normalize(torch.randn(12, 6), dim=-1) for _ in range(2))
    scale = torch.tensor([1.9, -3.0])
    out = {"images": images, "texts": texts, "scale": scale, "captions": torch.arange(12.0)}
    losses = open_clip_losses()
    for name, loss in {"infonce": losses.ClipLoss(), "sigmoid": losses.SigLipLoss()}.items():
        i, t, s = (x.clone().requires_grad_() for x in (images, texts, scale))
        bias = {} if name == "infonce" else {"logit_bias": s[1]}
        value = loss(i, t, logit_scale=s[0].exp(), **bias)
        value.backward()
        out |= {f"{name}.loss": value, f"{name}.images": i.grad, f"{name}.texts": t.grad, f"{name}.scale": s.grad}
        print(name, value.item(), file=sys.stderr)
    metadata = {name: version(name) for name in ("torch", "open_clip_torch")}
    save_file({name: tensor.detach().contiguous().float() for name, tensor in out.items()}, sys.argv[1], metadata)


if __name__ == "__main__":
    main()
