"""Convolutional blocks of the ADM / Stable Diffusion U-Net and of the autoencoders; embeddings of time and vectors.

A feature map is (B, C, ...) with one, two or three sides: (B, C, L), (B, C, H, W) or (B, C, F, H, W).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldm.errors import ConfigError
from ldm.tensors import POOL, expand, one_for_each

# by the number of sides of a feature map
CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

PaddingMode = Literal["zeros", "circular"]  # beyond the border: zeros, or the opposite border (data on a ring, a torus)
MIN_POSITIONS_FLOAT32_NORM = 256  # on smaller maps torch's bfloat16 kernel is faster
Resize = Callable[[Tensor, Size | None], Tensor]  # (B, C, ...) and, when upsampling, the sides of the result


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero, so that the residual branch it ends is initially zero (ADM, app. A)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def maybe_checkpoint(module: nn.Module, *args: Any, keep: bool = True) -> Tensor:
    """Call module(*args); if not `keep`, recompute its activations in the backward pass (Chen et al. 2016)."""
    return module(*args) if keep or not torch.is_grad_enabled() else checkpoint(module, *args, use_reentrant=False)


def conv(
    channels: int, out_channels: int, size: int = 3, stride: Any = 1, dims: int = 2, padding_mode: PaddingMode = "zeros"
) -> Any:
    """Build a convolution over `dims` sides with `size` taps a side, an odd number, padded to keep every side.

    stride: every how many positions, one number or one for each side.
    Raises ConfigError for another number of sides than 1, 2 or 3, and for an unknown padding.
    """
    if dims not in CONV:
        raise ConfigError(f"dims={dims}: expected 1, 2 or 3, the sides of a sample besides its channels")
    if padding_mode not in get_args(PaddingMode):
        raise ConfigError(f"padding_mode={padding_mode}: expected zeros or circular")
    return CONV[dims](channels, out_channels, size, stride, padding=size // 2, padding_mode=padding_mode)


def as_sides(value: int | Sequence[int], name: str) -> tuple[int, ...]:
    """Return a number for each side of a sample; a single number stands for both sides of an image.

    name: of the value in the config.  Raises ConfigError for other than one to three numbers, and for one below 1.
    """
    sides = (value, value) if isinstance(value, int) else tuple(value)
    if len(sides) not in CONV or min(sides) < 1:
        found = value if isinstance(value, int) else list(sides)
        raise ConfigError(f"{name}={found}: expected 1 or more, or a list of one to three such numbers, a side each")
    return sides


def pad_after(x: Tensor, strides: Sequence[int], padding_mode: PaddingMode = "zeros") -> Tensor:
    """Pad a map (B, C, ...) by one position at the end of each side that is halved, and at both of each that is not.

    A convolution of three taps with these strides then halves the former and keeps the latter.
    """
    margins = [margin for stride in reversed(strides) for margin in (0 if stride > 1 else 1, 1)]
    return F.pad(x, margins, mode={"zeros": "constant"}.get(padding_mode, padding_mode))


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
    """Halve every side of x (B, C, ...), rounded up, by means of 2 (2x2, 2x2x2) positions."""
    return POOL[x.ndim - 2](x, 2, ceil_mode=True)


def upsample(x: Tensor, size: Size | None = None, factor: Sequence[int] | None = None) -> Tensor:
    """Multiply the sides of x (B, C, ...) by these factors, by default 2, or reach `size`, by repeating positions."""
    factors = [2.0] * (x.ndim - 2) if factor is None else [float(one) for one in factor]
    return (
        F.interpolate(x, scale_factor=factors, mode="nearest")
        if size is None
        else F.interpolate(x, size=size, mode="nearest")
    )


class ResBlock(nn.Module):
    """Residual block of two convolutions of 3 taps a side with a time embedding: (B, C, ...), (B, E) -> (B, C', ...).

    ADM fig. 8.
    scale_shift: the embedding scales and shifts the second normalisation (ADM's AdaGN) instead of being added.
    resize: `downsample` or `upsample`, applied between the first normalisation and convolution and to the skip (BigGAN;
    ADM's up and down blocks).
    dims: sides of the map.  padding_mode: what the convolutions see beyond the border.
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
        dims: int = 2,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.norm1 = norm(channels, groups, eps)
        self.conv1 = conv(channels, out_channels, dims=dims, padding_mode=padding_mode)
        self.emb = nn.Linear(emb_dim, out_channels * (1 + scale_shift)) if emb_dim else None
        self.norm2 = norm(out_channels, groups, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(conv(out_channels, out_channels, dims=dims, padding_mode=padding_mode))
        self.skip = conv(channels, out_channels, 1, dims=dims) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        h = F.silu(self.norm1(x))
        if self.resize is not None:
            h, x = self.resize(h, size), self.resize(x, size)
        h = self.conv1(h)  # (B, C', ...)
        if self.emb is None or emb is None:
            h = self.norm2(h)
        else:
            projected = expand(self.emb(F.silu(emb)), h)
            if self.scale_shift:
                scale, shift = projected.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + projected)
        return self.skip(x) + self.conv2(self.dropout(F.silu(h)))


class Downsample(nn.Module):
    """Halve every side of (B, C, ...), rounded up, with a strided convolution of 3 taps a side.

    It has the signature of a ResBlock and ignores the time embedding.
    asymmetric: pad only at the end of each side, as DDPM's code and the autoencoders do (even sides only).
    stride: one number or one for each side: [1, 2, 2] keeps the number of frames of a clip.
    dims: sides of the map.  padding_mode: what the convolution sees beyond the border.
    """

    def __init__(
        self,
        channels: int,
        asymmetric: bool = False,
        stride: int | Sequence[int] = 2,
        dims: int = 2,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        self.asymmetric, self.padding_mode = asymmetric, padding_mode
        self.strides = one_for_each(stride, dims, "stride")
        self.conv = (
            CONV[dims](channels, channels, 3, self.strides)
            if asymmetric
            else conv(channels, channels, 3, self.strides, dims, padding_mode)
        )

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        return self.conv(pad_after(x, self.strides, self.padding_mode) if self.asymmetric else x)


class Upsample(nn.Module):
    """Double every side of (B, C, ...), or reach `size`, by nearest neighbour, then convolve with 3 taps a side.

    It has the signature of a ResBlock and ignores the time embedding.
    stride: the factor of each side where no size is given, one number or one for each.
    dims: sides of the map.  padding_mode: what the convolution sees beyond the border.
    """

    def __init__(
        self,
        channels: int,
        stride: int | Sequence[int] = 2,
        dims: int = 2,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        self.strides = one_for_each(stride, dims, "stride")
        self.conv = conv(channels, channels, dims=dims, padding_mode=padding_mode)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        return self.conv(upsample(x, size, self.strides))
