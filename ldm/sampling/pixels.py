"""What tasks do with samples and noise themselves: back-projection, interpolation on a sphere, filling of holes."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.tensors import POOL, expand


def back_project(image: Tensor, low_res: Tensor, steps: int) -> Tensor:
    """Add to the image (B, C, H, W) what its bicubic downsampling lacks of low_res (B, C, h, w), `steps` times (Irani &
    Peleg 1991).
    """
    for _ in range(steps):
        small = F.interpolate(image, low_res.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
        residual = low_res.to(image) - small
        image = image + F.interpolate(residual, image.shape[-2:], mode="bicubic", align_corners=False)
    return image


def slerp(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate spherically from a to b (B, ...), each row by its fraction (B,) of the arc (Shoemake 1985)."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    angle = torch.arccos(F.cosine_similarity(x, y).clamp(-1, 1))
    fraction = fraction.to(angle)
    parallel = angle.sin() < 1e-6
    u, v = (torch.where(parallel, w, (w * angle).sin() / angle.sin()) for w in (1 - fraction, fraction))
    return (expand(u, a) * a + expand(v, a) * b).to(a)


def fill_holes(image: Tensor, hole: Tensor) -> Tensor:
    """Fill the hole (B, 1, ...) bool of a sample (B, C, ...) from its edge inwards, each position by the mean of its
    known neighbours, of 3 (3x3, 3x3x3) positions.
    """
    known, image = (~hole).to(image), image.masked_fill(hole, 0)
    dims = image.ndim - 2
    pool, least = partial(POOL[dims], kernel_size=3, stride=1, padding=1), 0.5 / 3**dims
    while True:
        weight = pool(known)
        edge = (known == 0) & (weight > 0)
        if not edge.any():
            return image
        image = torch.where(edge, pool(image) / weight.clamp(min=least), image)
        known = known + edge.to(known)
