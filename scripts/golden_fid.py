#!/usr/bin/env python3
"""Makes tests/golden/fid.safetensors and tests/golden/fid_statistics.npz: the formulas of pytorch-fid (distance, also of
covariances without full rank) and torch-fidelity (KID, precision and recall, Inception Score) on given features, resized
images of clean-fid and Pillow, pooled features and logits of torchvision's InceptionV3, and statistics as pytorch-fid
saves them. Weights are by the formula of golden_weights.py.

    python3 -m venv venv && venv/bin/pip install torch torchvision numpy 'scipy<1.18' pillow safetensors tqdm
    venv/bin/pip install --no-deps pytorch-fid torch-fidelity clean-fid
    venv/bin/python scripts/golden_fid.py tests/golden
"""
import pathlib
import sys
from importlib.metadata import version

import numpy as np
import torch
import torchvision
from cleanfid.resize import make_resizer
from golden_inception import weight
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance
from safetensors.numpy import save_file
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric


def statistics(features):
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def formulas(random):
    out = {}
    # The first two have full rank, the others have fewer rows than columns.
    for name, rows, spread in (("a", 70, 1.0), ("b", 60, 1.2), ("c", 15, 1.0), ("d", 12, 1.5)):
        mixing = random.normal(size=(20, 20)) * 0.3 + np.eye(20)
        out[f"features.{name}"] = (random.normal(size=(rows, 20)) @ mixing * spread + spread).astype(np.float32)
    features = {name: torch.from_numpy(out[f"features.{name}"]) for name in "abcd"}
    for one, other in ("ab", "cd", "ad"):
        pair = [statistics(out[f"features.{name}"]) for name in (one, other)]
        out[f"fid.{one}{other}"] = np.array([calculate_frechet_distance(*pair[0], *pair[1])])
    kid = kid_features_to_metric(features["a"][:60].double(), features["b"].double(), kid_subsets=1, kid_subset_size=60)
    out["kid"] = np.array([kid["kernel_inception_distance_mean"]])
    prc = prc_features_to_metric(features["a"].double(), features["b"].double())
    out["prc"] = np.array([prc["precision"], prc["recall"]])
    logits = (random.normal(size=(43, 7)) * 2).astype(np.float32)
    isc = isc_features_to_metric(torch.from_numpy(logits), splits=5, shuffle=False)
    out |= {"logits": logits, "isc": np.array([isc["inception_score_mean"], isc["inception_score_std"]])}
    return out


def resized(random):
    out = {}
    for number, (size, target) in enumerate((((40, 31), (24, 20)), ((12, 9), (19, 23)), ((30, 64), (30, 17)))):
        image = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        bilinear = np.asarray(Image.fromarray(image).resize(target, Image.BILINEAR))
        out[f"resize.{number}.from"] = image.astype(np.float32)
        out[f"resize.{number}.clean"] = make_resizer("PIL", False, "bicubic", target)(image)
        out[f"resize.{number}.bilinear"] = bilinear.astype(np.float32)
    return out


def network(images):
    """torchvision's network, after the resizing of pytorch-fid, for the images of golden_inception.py."""
    model = torchvision.models.inception_v3(weights=None, transform_input=True, init_weights=False).eval()
    model.load_state_dict({name: weight(name, tensor) for name, tensor in model.state_dict().items()})
    x = torch.nn.functional.interpolate(torch.from_numpy(images), size=(299, 299), mode="bilinear", align_corners=False)
    pooled = []
    model.avgpool.register_forward_hook(lambda _, __, output: pooled.append(output.flatten(1)))
    with torch.no_grad():
        transformed = model._transform_input(x[:, :, :1, :1])
        model(x)
    return {"imagenet.features": pooled[0].numpy(), "imagenet.transformed": transformed[:, :, 0, 0].numpy()}


def main(folder):
    from safetensors.numpy import load_file
    torch.set_num_threads(1)
    random = np.random.default_rng(5)
    out = formulas(random) | resized(random) | network(load_file(folder / "inception.safetensors")["x"])
    names = ("pytorch-fid", "torch-fidelity", "clean-fid", "torch", "torchvision", "numpy", "scipy", "pillow")
    save_file({name: np.ascontiguousarray(value) for name, value in out.items()}, folder / "fid.safetensors",
              {name: version(name) for name in names})
    mu, sigma = statistics(out["features.c"])
    np.savez_compressed(folder / "fid_statistics.npz", mu=mu, sigma=sigma)
    for name in ("fid.ab", "fid.cd", "fid.ad", "kid", "prc", "isc"):
        print(name, out[name], file=sys.stderr)
    features = out["imagenet.features"]
    print(features.mean(), features.std(0).mean(), file=sys.stderr)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
