#!/usr/bin/env python3
"""Makes tests/golden/lpips.safetensors: distances of the `lpips` package over VGG-16 for two pairs of images, with
weights by the formula of golden_weights.py.

    python3 -m venv venv && venv/bin/pip install torch torchvision numpy safetensors scipy lpips
    venv/bin/python scripts/golden_lpips.py tests/golden/lpips.safetensors
"""
import sys
from importlib.metadata import version

import lpips
import torch
from golden_weights import fill_lpips
from safetensors.torch import save_file


def main():
    torch.manual_seed(3)
    torch.set_num_threads(1)
    network = fill_lpips(lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)).eval()
    a = torch.rand(2, 3, 32, 32) * 2 - 1
    b = (a + 0.3 * torch.randn_like(a)).clamp(-1, 1).requires_grad_()
    distance, layers = network(a, b, retPerLayer=True)
    distance.sum().backward()
    with torch.no_grad():
        deepest = network.net(network.scaling_layer(a)).relu5_3
    out = {"a": a, "b": b, "distance": distance.flatten(), "gradient": b.grad, "deepest": deepest.mean((2, 3)),
           "layers": torch.stack([layer.flatten() for layer in layers], 1)}
    metadata = {"torch": torch.__version__, "lpips": version("lpips")}
    save_file({k: v.detach().contiguous() for k, v in out.items()}, sys.argv[1], metadata)
    print(out["distance"], out["layers"], file=sys.stderr)


if __name__ == "__main__":
    main()
