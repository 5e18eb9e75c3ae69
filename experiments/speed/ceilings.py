"""What this machine multiplies in a second, measured: the peak that shares are of."""

import time
from functools import lru_cache

import torch
from torch.nn import functional as F


@lru_cache
def peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of the better of a product of 2,048 and a 3x3 convolution of 256 channels, the best of ten calls each.

    On a GPU of 8,192, and of 256 images for 8, so that neither is over before it is begun.
    """
    side, images = (2048, 8) if device == "cpu" else (8192, 256)
    a = torch.randn(side, side, dtype=dtype, device=device)
    x = torch.randn(images, 256, 32, 32, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        product = best(lambda: a @ a, device)
        convolution = best(lambda: F.conv2d(x, weight, padding=1), device)
    return max(2 * side**3 / product, 2 * images * 256 * 256 * 9 * 32 * 32 / convolution)


def best(call, device: str, times: int = 10) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
