"""The convolutional blocks of the ADM / Stable Diffusion U-Net and of the autoencoders."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero, so that the residual branch it ends begins as nothing (ADM, app. A)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    """Group normalisation with `groups` groups, or their largest common divisor with `channels`."""
    return nn.GroupNorm(math.gcd(channels, groups), channels, eps=1e-5)


def sinusoid(t: Tensor, dim: int, longest: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of t (B,), in the network's time units, as (B, dim) float: cosines, then sines (DDPM, sec. B)."""
    half = dim // 2
    rates = torch.exp(-math.log(longest) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions that is told the time (ADM fig. 8): h (B, C, H, W), emb (B, E) -> (B, C', H, W).

    scale_shift: the embedding scales and shifts the second normalisation (ADM's AdaGN) and is not merely added.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        groups: int = 32,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels * (1 + scale_shift)) if emb_dim else None
        self.norm2 = norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C', H, W)
        if self.emb is None or emb is None:
            h = self.norm2(h)
        else:
            told = self.emb(F.silu(emb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = told.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + told)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width by nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)
