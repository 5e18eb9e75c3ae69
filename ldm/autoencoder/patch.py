"""A small, fast encoder and decoder at the latent's resolution: space-to-depth, residual blocks, a linear shortcut."""

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, cat, nn

from ldm.net.blocks import CONV, PaddingMode, ResBlock, as_sides, conv, norm, require_positive, zero_module
from ldm.tensors import divide_sides


class PatchEncoder(nn.Module):
    """Sample (B, C, ...) -> moments (B, 2 z_channels, ...), with sides divided by `factor`.

    factor: the sides of a patch: one number for both of an image's, or a list of one, two or three for (B, C, L),
    (B, C, H, W) or (B, C, F, H, W).
    The positions of a patch are channels of `num_res_blocks` residual blocks of `width` channels. A linear map from the
    patch directly to the mean makes training start from a linear code.
    padding_mode: what every convolution sees beyond the border: zeros, or circular, the opposite border.
    """

    def __init__(
        self,
        channels: int,
        z_channels: int,
        factor: int | Sequence[int],
        width: int = 64,
        num_res_blocks: int = 2,
        num_groups: int = 4,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        self.factor, self.z_channels = as_sides(factor, "factor"), z_channels
        require_positive(width=width)
        patch, shape = channels * math.prod(self.factor), conv_shape(self.factor, padding_mode)
        self.stem = conv(patch, width, **shape)
        self.blocks = nn.Sequential(
            *(ResBlock(width, width, groups=num_groups, **shape) for _ in range(num_res_blocks))
        )
        self.out = nn.Sequential(norm(width, num_groups), nn.SiLU(), zero_module(conv(width, 2 * z_channels, **shape)))
        self.shortcut = CONV[len(self.factor)](patch, z_channels, 1)
        # start with a narrow posterior, not with unit noise
        nn.init.constant_(cast(Tensor, self.out[-1].bias)[z_channels:], -4.0)

    @staticmethod
    def spatial_dims(factor: int | Sequence[int], **options: Any) -> int:
        """Return the number of sides of the samples that an encoder with these options takes."""
        return len(as_sides(factor, "factor"))

    def forward(self, image: Tensor) -> Tensor:
        patches = unshuffle(image, self.factor)  # (B, C f f, h, w)
        moments = self.out(self.blocks(self.stem(patches)))  # (B, 2 z_channels, h, w)
        mean, logvar = moments.chunk(2, dim=1)
        return cat([mean + self.shortcut(patches), logvar], dim=1)


class PatchDecoder(nn.Module):
    """Latent (B, z_channels, ...) -> sample (B, C, ...): the mirrored encoder, with a linear map to the patch.

    The options are PatchEncoder's.
    """

    def __init__(
        self,
        channels: int,
        z_channels: int,
        factor: int | Sequence[int],
        width: int = 64,
        num_res_blocks: int = 3,
        num_groups: int = 4,
        padding_mode: PaddingMode = "zeros",
    ):
        super().__init__()
        self.factor = as_sides(factor, "factor")
        require_positive(width=width)
        patch, shape = channels * math.prod(self.factor), conv_shape(self.factor, padding_mode)
        self.stem = conv(z_channels, width, **shape)
        self.blocks = nn.Sequential(
            *(ResBlock(width, width, groups=num_groups, **shape) for _ in range(num_res_blocks))
        )
        self.out = nn.Sequential(norm(width, num_groups), nn.SiLU(), zero_module(conv(width, patch, **shape)))
        self.shortcut = CONV[len(self.factor)](z_channels, patch, 1)

    @staticmethod
    def spatial_dims(factor: int | Sequence[int], **options: Any) -> int:
        """Return the number of sides of the samples that a decoder with these options makes."""
        return len(as_sides(factor, "factor"))

    def forward(self, z: Tensor) -> Tensor:
        return shuffle(self.out(self.blocks(self.stem(z))) + self.shortcut(z), self.factor)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the reconstruction and adversarial losses."""
        return cast(Tensor, self.out[-1].weight)


def unshuffle(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Make the positions of a patch channels: (B, C, ...) -> (B, C * prod(factor), ...), sides divided by `factor`.

    The order of the channels is torch's in two dimensions: C, then the first side, then the second (pixel_unshuffle).
    """
    dims, cells = len(factor), divide_sides(x.shape[2:], factor)
    split = [length for pair in zip(cells, factor, strict=True) for length in pair]
    inside, outside = range(3, 3 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
    return x.reshape(*x.shape[:2], *split).permute(0, 1, *inside, *outside).reshape(len(x), -1, *cells)


def shuffle(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Put the channels of a patch at its positions: (B, C * prod(factor), ...) -> (B, C, ...); unshuffle's inverse.

    Torch's pixel_shuffle in two dimensions.
    """
    dims, cells = len(factor), x.shape[2:]
    sides = [cell * length for cell, length in zip(cells, factor, strict=True)]
    axes = [axis for side in range(dims) for axis in (2 + dims + side, 2 + side)]
    return x.reshape(len(x), -1, *factor, *cells).permute(0, 1, *axes).reshape(len(x), -1, *sides)


def conv_shape(factor: Sequence[int], padding_mode: PaddingMode) -> dict[str, Any]:
    """Return the options of the convolutions over patches with these sides."""
    return {"dims": len(factor), "padding_mode": padding_mode}
