"""Convolutional blocks of the ADM / Stable Diffusion U-Net and of the autoencoders; embeddings of time and vectors."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.errors import ConfigError

MIN_POSITIONS_FLOAT32_NORM = 256  # on smaller maps torch's bfloat16 kernel is faster
Resize = Callable[[Tensor, Size | None], Tensor]  # (B, C, H, W) and, when upsampling, the target (height, width)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, so that the residual branch it ends is initially zero (ADM, app. A)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def maybe_checkpoint(module: nn.Module, *args: Any, keep: bool = True) -> Tensor:
    """Call module(*args); if not `keep`, recompute its activations in the backward pass (Chen et al. 2016)."""
    return module(*args) if keep or not torch.is_grad_enabled() else checkpoint(module, *args, use_reentrant=False)


def require_positive(**sizes: int) -> None:
    """Raise ConfigError for a size below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size}: expected 1 or more")


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, computed in the precision of its weights (ADM's GroupNorm32) for bfloat16 maps on a CPU.

    On all but small maps this takes half the time there.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype == self.weight.dtype or x.shape[2:].numel() < MIN_POSITIONS_FLOAT32_NORM:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def norm(channels: int, groups: int = 32, eps: float = 1e-5) -> GroupNorm:
    """Build a group normalisation with `groups` groups, or their largest common divisor with `channels`."""
    return GroupNorm(math.gcd(channels, groups), channels, eps=eps)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed t (B,), in the network's time units, as (B, dim) float: cosines, then sines (ADM; DDPM, sec. B).

    Raises ConfigError unless max_period is above 0.
    """
    if max_period <= 0:
        raise ConfigError(f"max_period={max_period}: expected a period above 0")
    half = dim // 2
    rates = torch.exp(-math.log(max_period) / half * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def ddpm_sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed t as DDPM's code does: sines, then cosines, the slowest of period 2 pi max_period exactly.

    Shapes are those of timestep_embedding.
    """
    half = dim // 2
    rates = torch.exp(-math.log(max_period) / (half - 1) * torch.arange(half, device=t.device, dtype=t.dtype))
    angles = t[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def reversed_timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed 1 - t / 1000 by timestep_embedding: SiT's and LightningDiT's time runs from noise at 0 to data at 1."""
    return timestep_embedding(1 - t / 1000, dim, max_period)


def mlp(inputs: int, width: int) -> nn.Sequential:
    """Build two linear layers with a SiLU between: (B, inputs) -> (B, width).

    For a time embedding, or for a vector added to it (SDXL).
    """
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


def identity_embedding(inputs: int, width: int) -> nn.Identity:
    """Build the identity: the vector is added to the time embedding unchanged, as ADM and DiT add a class's row.

    Raises ConfigError if the two widths differ.
    """
    if inputs != width:
        raise ConfigError(
            f"a vector of {inputs} cannot be added to an embedding of {width}: "
            f"set conditioner.dim={width}, or net.vector_embedding to mlp"
        )
    return nn.Identity()


def downsample(x: Tensor, size: Size | None = None) -> Tensor:
    """Halve height and width of x (B, C, H, W), rounded up, by means of 2x2 pixels."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def upsample(x: Tensor, size: Size | None = None) -> Tensor:
    """Double height and width of x (B, C, H, W), or resize it to `size` if that was odd, by repeating pixels."""
    return (
        F.interpolate(x, scale_factor=2.0, mode="nearest")
        if size is None
        else F.interpolate(x, size=size, mode="nearest")
    )


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions with a time embedding: h (B, C, H, W), emb (B, E) -> (B, C', H, W).

    ADM fig. 8.
    scale_shift: the embedding scales and shifts the second normalisation (ADM's AdaGN) instead of being added.
    resize: `downsample` or `upsample`, applied between the first normalisation and convolution and to the skip (BigGAN;
    ADM's up and down blocks).
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
            projected = self.emb(F.silu(emb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = projected.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + projected)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Downsample(nn.Module):
    """Halve height and width, rounded up, with a strided 3x3 convolution.

    It has the signature of a ResBlock and ignores the time embedding.
    asymmetric: pad with zeros only at the right and at the bottom, as DDPM's code and the autoencoders do (even sizes
    only).
    """

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double height and width (or reach `size`) by nearest neighbour, then a 3x3 convolution.

    It has the signature of a ResBlock and ignores the time embedding.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        return self.conv(upsample(x, size))  # (B, C, 2H, 2W)
