"""The encoder and decoder of latent diffusion's first stages (LDM app. G; VQGAN, Esser et al. 2021, app. A)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import ConfigError
from ldm.net.attention import AttentionFn, sdpa
from ldm.net.blocks import CONV, Downsample, PaddingMode, Upsample, as_sides, conv
from ldm.net.blocks import norm as group_norm

norm = partial(group_norm, eps=1e-6)  # eps differs from the U-Net's


class Residual(nn.Module):
    """Two normalised convolutions (B, C, ...) -> (B, C', ...) with a skip: the U-Net's block without time."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        groups: int = 32,
        dims: int = 2,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        shape: Any = {"dims": dims, "padding_mode": padding_mode}
        self.norm1, self.conv1 = norm(channels, groups), conv(channels, out_channels, **shape)
        self.norm2, self.conv2 = norm(out_channels, groups), conv(out_channels, out_channels, **shape)
        self.skip = CONV[dims](channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C', ...)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Single-head attention of a feature map (B, C, ...) over itself, added to the input."""

    def __init__(self, channels: int, groups: int = 32, attend: AttentionFn = sdpa, dims: int = 2):
        super().__init__()
        self.attend, self.norm = attend, norm(channels, groups)
        self.q, self.k, self.v, self.out = (CONV[dims](channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, 1, N, C) each
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v, None).squeeze(1).transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if there is any, then resampling."""

    def __init__(self, blocks: list[Residual], attention: list[SpatialAttention], resample: nn.Module | None):
        super().__init__()
        self.blocks, self.attention, self.resample = nn.ModuleList(blocks), nn.ModuleList(attention), resample

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            h = block(h)
            if self.attention:
                h = self.attention[i](h)
        return h if self.resample is None else self.resample(h)


def middle(
    width: int, groups: int, attend: AttentionFn | None, dims: int = 2, padding_mode: PaddingMode = "zeros"
) -> nn.Sequential:
    """Build a residual block, attention (none if attend is None) and a residual block."""
    attention = SpatialAttention(width, groups, attend, dims) if attend else nn.Identity()
    blocks = [Residual(width, width, groups, dims, padding_mode) for _ in range(2)]
    return nn.Sequential(blocks[0], attention, blocks[1])


def level_strides(factor: int | Sequence[int] | None, levels: int) -> list[tuple[int, ...]]:
    """Return by what each side is divided between one level and the next, (levels - 1) x sides: 2 or 1.

    A side is halved until it has been divided by its factor.  factor None: 2^(levels - 1), of both sides of an image.
    Raises ConfigError for a factor that is no power of 2, and unless the largest is 2^(levels - 1).
    """
    largest = 2 ** (levels - 1)
    factors = as_sides(largest if factor is None else factor, "factor")
    if max(factors) != largest or any(one & (one - 1) for one in factors):
        raise ConfigError(
            f"factor={list(factors)}: expected powers of 2, the largest {largest}, for {levels} levels of channel_mult"
        )
    return [tuple(2 if 2**level < one else 1 for one in factors) for level in range(levels - 1)]


class Encoder(nn.Module):
    """Sample (B, C, ...) -> moments (B, 2 z_channels, ...), or a point (B, z_channels, ...) if not double_z.

    factor: by what the sides are divided, powers of 2: one number, 2^(len(channel_mult) - 1), for both sides of an
    image; or a list of one, two or three for (B, C, L), (B, C, H, W) or (B, C, F, H, W), of which the largest is that
    number: [4, 8, 8] halves a clip's frames twice, in its first levels.  None: the number for images.
    width, channel_mult: channels, and their factor at each level.  num_res_blocks: residual blocks per level.
    attention_resolutions: the largest side's downsampling factors (1, 2, 4, ...) at which every block is followed by
    attention: a paper's `attn_resolutions: [16]` for 256 px is the factor 16.
    middle_attention: whether the middle has attention (all of LDM's models except the VQ model "no attn" of Tab. 8).
    padding_mode: what every convolution sees beyond the border: zeros, or circular, the opposite border.
    Raises ConfigError for a factor that does not fit the levels.
    """

    def __init__(
        self,
        channels: int = 3,
        z_channels: int = 4,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (),
        middle_attention: bool = True,
        double_z: bool = True,
        num_groups: int = 32,
        attention_fn: AttentionFn = sdpa,
        factor: int | Sequence[int] | None = None,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        strides = level_strides(factor, len(channel_mult))
        dims = spatial_dims(factor)
        self.stem = conv(channels, width, dims=dims, padding_mode=padding_mode)
        self.down = nn.ModuleList()  # finest first
        inside = width
        for level, mult in enumerate(channel_mult):
            outside = mult * width
            sizes = [inside, *[outside] * (num_res_blocks - 1)]
            attention = (
                [SpatialAttention(outside, num_groups, attention_fn, dims) for _ in sizes]
                if 2**level in attention_resolutions
                else []
            )
            # padded at the end of each side alone, as LDM's first stages are
            resample = (
                Downsample(outside, True, strides[level], dims, padding_mode) if level < len(channel_mult) - 1 else None
            )
            blocks = [Residual(size, outside, num_groups, dims, padding_mode) for size in sizes]
            self.down.append(Level(blocks, attention, resample))
            inside = outside
        outputs = 2 * z_channels if double_z else z_channels
        self.middle = middle(inside, num_groups, attention_fn if middle_attention else None, dims, padding_mode)
        last = conv(inside, outputs, dims=dims, padding_mode=padding_mode)
        self.out = nn.Sequential(norm(inside, num_groups), nn.SiLU(), last)
        self.moments = CONV[dims](outputs, outputs, 1)

    @staticmethod
    def spatial_dims(factor: int | Sequence[int] | None = None, **options: Any) -> int:
        """Return the number of sides of the samples that an encoder with these options takes."""
        return spatial_dims(factor)

    def forward(self, image: Tensor) -> Tensor:
        h = self.stem(image)
        for level in self.down:
            h = level(h)
        return self.moments(self.out(self.middle(h)))


class Decoder(nn.Module):
    """Latent (B, z_channels, ...) -> sample (B, C, ...) with sides `factor` times as long; options as in Encoder."""

    def __init__(
        self,
        channels: int = 3,
        z_channels: int = 4,
        width: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (),
        middle_attention: bool = True,
        num_groups: int = 32,
        attention_fn: AttentionFn = sdpa,
        factor: int | Sequence[int] | None = None,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        strides = level_strides(factor, len(channel_mult))
        dims = spatial_dims(factor)
        inside = channel_mult[-1] * width
        self.latent = CONV[dims](z_channels, z_channels, 1)
        self.stem = conv(z_channels, inside, dims=dims, padding_mode=padding_mode)
        self.middle = middle(inside, num_groups, attention_fn if middle_attention else None, dims, padding_mode)
        levels = []
        for level, mult in reversed(list(enumerate(channel_mult))):
            outside = mult * width
            sizes = [inside, *[outside] * num_res_blocks]
            attention = (
                [SpatialAttention(outside, num_groups, attention_fn, dims) for _ in sizes]
                if 2**level in attention_resolutions
                else []
            )
            resample = Upsample(outside, strides[level - 1], dims, padding_mode) if level > 0 else None
            blocks = [Residual(size, outside, num_groups, dims, padding_mode) for size in sizes]
            levels.append(Level(blocks, attention, resample))
            inside = outside
        self.up = nn.ModuleList(reversed(levels))  # finest first, as in `down`: level i has the same resolution in both
        last = conv(inside, channels, dims=dims, padding_mode=padding_mode)
        self.out = nn.Sequential(norm(inside, num_groups), nn.SiLU(), last)

    @staticmethod
    def spatial_dims(factor: int | Sequence[int] | None = None, **options: Any) -> int:
        """Return the number of sides of the samples that a decoder with these options makes."""
        return spatial_dims(factor)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.stem(self.latent(z)))
        for level in reversed(self.up):
            h = level(h)
        return self.out(h)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the reconstruction and adversarial losses."""
        return cast(Tensor, self.out[-1].weight)


def spatial_dims(factor: int | Sequence[int] | None) -> int:
    """Return the number of sides that a first stage's factor is of: 2 for None and for one number."""
    return len(as_sides(factor or 1, "factor"))
