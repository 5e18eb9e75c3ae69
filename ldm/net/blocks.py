"""The convolutional blocks of the ADM / Stable Diffusion U-Net and of the autoencoders, and how time and vectors are embedded."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.errors import ConfigError

PLACES = 256  # of smaller maps bfloat16 is normalised sooner as it is
Resize = Callable[[Tensor, Size | None], Tensor]  # (B, C, H, W) and, for the way up, the (height, width) to reach


def zero_module(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero, so that the residual branch it ends begins as nothing (ADM, app. A)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def maybe_checkpoint(module: nn.Module, *args: Any, keep: bool = True) -> Tensor:
    """module(*args); without `keep` its activations are computed again in the backward pass instead (Chen et al. 2016)."""
    return module(*args) if keep or not torch.is_grad_enabled() else checkpoint(module, *args, use_reentrant=False)


def require_positive(**sizes: int) -> None:
    """Raises ConfigError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size}: expected 1 or more")


class GroupNorm(nn.GroupNorm):
    """torch's; maps of bfloat16 on a CPU go through it in the precision of its weights (ADM's GroupNorm32), in half the time."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype == self.weight.dtype or x.shape[2:].numel() < PLACES:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def norm(channels: int, groups: int = 32, eps: float = 1e-5) -> GroupNorm:
    """Group normalisation with `groups` groups, or their largest common divisor with `channels`."""
    return GroupNorm(math.gcd(channels, groups), channels, eps=eps)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of t (B,), in the network's time units, as (B, dim) float: cosines, then sines (ADM; DDPM, sec. B).

    Raises ConfigError for a period `longest` that is none.
    """
    if max_period <= 0:
        raise ConfigError(f"max_period={max_period}: expected a period above 0")
    half = dim // 2
    rates = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def ddpm_sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """As `sinusoid`, the way DDPM's own code has it: sines, then cosines, the slowest of period 2 pi `longest` exactly."""
    half = dim // 2
    rates = torch.exp(-math.log(max_period) / (half - 1) * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def reversed_timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """As `sinusoid`, of 1 - t / 1000: time as SiT's and LightningDiT's networks are told it, from noise at 0 to data at 1."""
    return timestep_embedding(1 - t / 1000, dim, max_period)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Two linear layers and a SiLU between: (B, inputs) -> (B, width), for a time embedding or for a vector added to it (SDXL)."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def identity_embedding(inputs: int, width: int) -> nn.Identity:
    """Nothing at all: the vector is added to the time embedding as it is, as ADM and DiT add a class's row.

    Raises ConfigError if the two widths differ.
    """
    if inputs != width:
        raise ConfigError(
            f"a vector of {inputs} cannot be added to an embedding of {width}: set conditioner.dim={width}, or net.vector to mlp"
        )
    return nn.Identity()


def downsample(x: Tensor, size: Size | None = None) -> Tensor:
    """x (B, C, H, W) at half the height and width, rounded up: means of 2x2 pixels."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def upsample(x: Tensor, size: Size | None = None) -> Tensor:
    """x (B, C, H, W) at twice the height and width, or at `size` for what was odd: pixels repeated."""
    return (
        F.interpolate(x, scale_factor=2.0, mode="nearest")
        if size is None
        else F.interpolate(x, size=size, mode="nearest")
    )


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions that is told the time (ADM fig. 8): h (B, C, H, W), emb (B, E) -> (B, C', H, W).

    scale_shift: the embedding scales and shifts the second normalisation (ADM's AdaGN) and is not merely added.
    resize: `halve` or `double`, done between the first normalisation and convolution, and to the skip (BigGAN; ADM's up and down blocks).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int | None = None,
        dropout: float = 0.0,
        scale_shift: bool = False,
        groups: int = 32,
        eps: float = 1e-5,
        resize: Resize | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.norm1 = norm(channels, groups, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels * (1 + scale_shift)) if emb_dim else None
        self.norm2 = norm(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resize is not None:
            h, x = self.resize(h, size), self.resize(x, size)
        h = self.conv1(h)  # (B, C', H, W)
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
    """Halve height and width, rounded up, with a strided 3x3 convolution; it is called as a ResBlock is, and the time tells it nothing.

    asymmetric: zeros at the right and at the bottom alone, as DDPM's own code and the autoencoders have it (even sizes only).
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width (or reach `size`) by nearest neighbour, then a 3x3 convolution; called as a ResBlock is."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        return self.conv(upsample(x, size))  # (B, C, 2H, 2W)
