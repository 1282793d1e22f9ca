#!/usr/bin/env python3
"""Makes tests/golden/inception.safetensors: features of pytorch-fid's InceptionV3 for two images, with weights by the
formula of golden_weights.py.

    python3 -m venv venv && venv/bin/pip install torch torchvision numpy scipy safetensors
    venv/bin/pip install --no-deps pytorch-fid
    venv/bin/python scripts/golden_inception.py tests/golden/inception.safetensors
"""
import sys
from importlib.metadata import version

import pytorch_fid.inception as inception
import torch
from golden_weights import hashed
from safetensors.torch import save_file


def weight(name, tensor):
    if name.endswith("conv.weight"):
        return hashed(name, tensor.shape, (24 / tensor[0].numel()) ** 0.5)
    if name.endswith("bn.weight"):
        return 1 + hashed(name, tensor.shape, 0.2)
    if name.endswith("running_var"):
        return 1 + hashed(name, tensor.shape, 0.4).abs()
    return hashed(name, tensor.shape, 0.1) if tensor.is_floating_point() else tensor


def main():
    torch.manual_seed(9)
    torch.set_num_threads(1)
    empty = inception._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, kind in (("Mixed_5b", (192, 32)), ("Mixed_5c", (256, 64)), ("Mixed_5d", (288, 64))):
        setattr(empty, name, inception.FIDInceptionA(kind[0], pool_features=kind[1]))
    state = {name: weight(name, tensor) for name, tensor in empty.state_dict().items()}
    inception.load_state_dict_from_url = lambda *args, **kwargs: state
    network = inception.InceptionV3([3]).eval()
    x = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        features = network(x)[0].flatten(1)
    save_file({"x": x, "features": features}, sys.argv[1],
              {"torch": torch.__version__, "pytorch-fid": version("pytorch-fid")})
    print(features.mean(), features.std(0).mean(), features.max(), file=sys.stderr)


if __name__ == "__main__":
    main()
