#!/usr/bin/env python3
"""Makes tests/golden/similarity.safetensors: the Fréchet distance of pytorch-fid between two Gaussians, and
scikit-image's structural similarity of two pairs of images.

    python3 -m venv venv && venv/bin/pip install torch torchvision numpy scipy scikit-image safetensors
    venv/bin/pip install --no-deps pytorch-fid
    venv/bin/python scripts/golden_frechet.py tests/golden/similarity.safetensors
"""
import sys
from importlib.metadata import version

import numpy as np
from pytorch_fid.fid_score import calculate_frechet_distance
from safetensors.numpy import save_file
from skimage.metrics import structural_similarity


def main():
    random = np.random.default_rng(2)
    out, sets = {}, []
    for name, spread in (("a", 1.0), ("b", 1.7)):
        mixing = random.normal(size=(24, 24)) * spread
        features = (random.normal(size=(60, 24)) @ mixing + random.normal(size=24)).astype(np.float32)
        out[f"features.{name}"] = features
        sets.append((features.astype(np.float64).mean(0), np.cov(features.astype(np.float64), rowvar=False)))
    out["distance"] = np.array([calculate_frechet_distance(*sets[0], *sets[1])])
    first = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    near = np.clip(first.astype(int) + random.integers(-9, 10, first.shape), 0, 255).astype(np.uint8)
    far = random.integers(0, 256, first.shape, dtype=np.uint8)
    out |= {name: image.astype(np.float32) for name, image in (("first", first), ("near", near), ("far", far))}
    out["ssim"] = np.array([structural_similarity(first, other, channel_axis=2, data_range=255) for other in (near, far)])
    metadata = {name: version(name) for name in ("pytorch-fid", "scikit-image", "numpy")}
    save_file(out, sys.argv[1], metadata)
    print(out["distance"], out["ssim"], file=sys.stderr)


if __name__ == "__main__":
    main()
