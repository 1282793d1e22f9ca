"""Weights by a formula, for networks too large to be stored: src/ops/testing.rs repeats it bit by bit."""
import zlib

import numpy as np
import torch


def hashed(name, shape, scale):
    """Uniform in -scale/2..scale/2, keyed by name and flat index."""
    h = np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(2654435761) + np.uint32(zlib.crc32(name.encode()))
    h ^= h >> np.uint32(15)
    h *= np.uint32(2246822519)
    h ^= h >> np.uint32(13)
    values = ((h >> np.uint32(8)).astype(np.float64) / 2**24 - 0.5) * scale
    return torch.from_numpy(values.astype(np.float32)).reshape(tuple(shape))


def fill_lpips(network):
    """Fills an LPIPS network (of `lpips` or taming-transformers: the same names)."""
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.startswith("lin") and "." in name and name[3].isdigit():
                p.copy_(hashed(name, p.shape, 0.2).abs())
            elif name.startswith("net."):
                fan_in = p[0].numel()
                p.copy_(hashed(name, p.shape, (24 / fan_in) ** 0.5 if p.dim() == 4 else 0.1))
    return network
