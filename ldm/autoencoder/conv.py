"""The encoder and decoder of latent diffusion's first stages (LDM app. G; VQGAN, Esser et al. 2021, app. A)."""

from collections.abc import Sequence
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.net.attention import AttentionFn, sdpa
from ldm.net.blocks import Upsample
from ldm.net.blocks import norm as group_norm

norm = partial(group_norm, eps=1e-6)  # eps differs from the U-Net's


class Residual(nn.Module):
    """Two normalised 3x3 convolutions (B, C, H, W) -> (B, C', H, W) with a skip: the U-Net's block without time."""

    def __init__(self, channels: int, out_channels: int, groups: int = 32):
        super().__init__()
        self.norm1, self.conv1 = norm(channels, groups), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = norm(out_channels, groups), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C', H, W)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Single-head attention of a feature map (B, C, H, W) over itself, added to the input."""

    def __init__(self, channels: int, groups: int = 32, attend: AttentionFn = sdpa):
        super().__init__()
        self.attend, self.norm = attend, norm(channels, groups)
        self.q, self.k, self.v, self.out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, 1, H W, C) each
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        return x + self.out(self.attend(q, k, v, None).squeeze(1).transpose(1, 2).reshape(x.shape))


class PaddedDownsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution, padded on the right and below as in LDM's first stages."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


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


def middle(width: int, groups: int, attend: AttentionFn | None) -> nn.Sequential:
    """Build a residual block, attention (none if attend is None) and a residual block."""
    attention = SpatialAttention(width, groups, attend) if attend else nn.Identity()
    return nn.Sequential(Residual(width, width, groups), attention, Residual(width, width, groups))


class Encoder(nn.Module):
    """Image (B, C, H, W) -> moments (B, 2 z_channels, H/f, W/f), or a point (B, z_channels, ...) if not double_z.

    f = 2^(len(channel_mult) - 1).
    width, channel_mult: channels, and their factor at each level.  num_res_blocks: residual blocks per level.
    attention_resolutions: the downsampling factors (1, 2, 4, ...) at which every block is followed by attention: a
    paper's `attn_resolutions: [16]` for 256 px is the factor 16.
    middle_attention: whether the middle has attention (all of LDM's models except the VQ model "no attn" of Tab. 8).
    """

    spatial_dims = 2

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
    ):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList()  # finest first
        inside = width
        for level, factor in enumerate(channel_mult):
            outside = factor * width
            sizes = [inside, *[outside] * (num_res_blocks - 1)]
            attention = (
                [SpatialAttention(outside, num_groups, attention_fn) for _ in sizes]
                if 2**level in attention_resolutions
                else []
            )
            resample = PaddedDownsample(outside) if level < len(channel_mult) - 1 else None
            self.down.append(Level([Residual(size, outside, num_groups) for size in sizes], attention, resample))
            inside = outside
        outputs = 2 * z_channels if double_z else z_channels
        self.middle = middle(inside, num_groups, attention_fn if middle_attention else None)
        self.out = nn.Sequential(norm(inside, num_groups), nn.SiLU(), nn.Conv2d(inside, outputs, 3, padding=1))
        self.moments = nn.Conv2d(outputs, outputs, 1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.stem(image)
        for level in self.down:
            h = level(h)
        return self.moments(self.out(self.middle(h)))


class Decoder(nn.Module):
    """Latent (B, z_channels, h, w) -> image (B, C, f h, f w), f = 2^(len(channel_mult) - 1); options as in Encoder."""

    spatial_dims = 2

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
    ):
        super().__init__()
        inside = channel_mult[-1] * width
        self.latent = nn.Conv2d(z_channels, z_channels, 1)
        self.stem = nn.Conv2d(z_channels, inside, 3, padding=1)
        self.middle = middle(inside, num_groups, attention_fn if middle_attention else None)
        levels = []
        for level, factor in reversed(list(enumerate(channel_mult))):
            outside = factor * width
            sizes = [inside, *[outside] * num_res_blocks]
            attention = (
                [SpatialAttention(outside, num_groups, attention_fn) for _ in sizes]
                if 2**level in attention_resolutions
                else []
            )
            resample = Upsample(outside) if level > 0 else None
            levels.append(Level([Residual(size, outside, num_groups) for size in sizes], attention, resample))
            inside = outside
        self.up = nn.ModuleList(reversed(levels))  # finest first, as in `down`: level i has the same resolution in both
        self.out = nn.Sequential(norm(inside, num_groups), nn.SiLU(), nn.Conv2d(inside, channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.stem(self.latent(z)))
        for level in reversed(self.up):
            h = level(h)
        return self.out(h)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the reconstruction and adversarial losses."""
        return cast(Tensor, self.out[-1].weight)
