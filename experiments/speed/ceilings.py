"""What this machine multiplies in a second, measured: the peak that shares are of."""

import time
from functools import lru_cache

import torch
from torch.nn import functional as F


@lru_cache
def peak(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of the better of a product of 2,048 and a 3x3 convolution of 256 channels, the best of ten calls each."""
    a = torch.randn(2048, 2048, dtype=dtype, device=device)
    x = torch.randn(8, 256, 32, 32, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        product = best(lambda: a @ a, device)
        convolution = best(lambda: F.conv2d(x, weight, padding=1), device)
    return max(2 * 2048**3 / product, 2 * 8 * 256 * 256 * 9 * 32 * 32 / convolution)


def best(call, device: str, times: int = 10) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
