"""A first stage that processes large images tile by tile, with the memory of one tile."""

import itertools
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder.first_stage import FirstStage
from ldm.autoencoder.posterior import DeterministicPosterior, DiagonalGaussian
from ldm.errors import ConfigError
from ldm.tensors import one_for_each


class Tiled(nn.Module):
    """A first stage that encodes and decodes tile by tile, with the signature of the one it wraps.

    tile, overlap: in positions of the latent (tile * factor pixels), 0 <= overlap < tile.  Neighbouring tiles share at
    least `overlap` positions and are blended linearly over them.  An image that fits one tile is not split; in others,
    normalisation and attention are computed within a tile and not over the image, so that the result is close to the
    untiled one but not equal to it.
    Raises ConfigError unless 0 <= overlap < tile.
    """

    def __init__(self, autoencoder: FirstStage, tile: int = 64, overlap: int = 16):
        super().__init__()
        if not 0 <= overlap < tile:
            raise ConfigError(
                f"tile={tile} overlap={overlap}: expected 0 <= overlap < tile, in positions of the latent"
            )
        self.autoencoder, self.tile, self.overlap = autoencoder, tile, overlap

    def __getattr__(self, name: str):
        """Return other attributes of the wrapped first stage: factor, z_channels, shift, scale, normalise, ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("autoencoder"), name)

    def posterior(self, image: Tensor) -> DiagonalGaussian | DeterministicPosterior:
        """Return q(z | image) with blended moments. Raises ConfigError for a size the factor does not divide."""
        self.autoencoder.require_size(image)
        encode, factors = lambda part: self.autoencoder.posterior(part).moments, self.factors(image)
        return self.autoencoder.posterior_of(
            tiled(encode, image, self.tile, self.overlap, factors, (1,) * len(factors))
        )

    def encode(self, image: Tensor) -> Tensor:
        """Return z (B, z_channels, ...) of the posterior's mode."""
        return self.autoencoder.normalise(self.posterior(image).mode)

    def decode(self, z: Tensor) -> Tensor:
        """Decode z to an image (B, C, ...), about [-1, 1]."""
        factors = self.factors(z)
        return tiled(self.autoencoder.decode, z, self.tile, self.overlap, (1,) * len(factors), factors)

    def factors(self, x: Tensor) -> tuple[int, ...]:
        """Return the first stage's factor of each side of x (B, C, ...)."""
        return one_for_each(self.autoencoder.factor, x.ndim - 2, "factor")


def tiled(
    f: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, down: Sequence[int], up: Sequence[int]
) -> Tensor:
    """Apply f to tiles of x (B, C, ...), at most `tile` cells long on every side, and blend the results.

    f maps (B, C, ...) to (B, C', ...).  tile, overlap: in cells, whose sides are `down` positions of x and `up` of the
    result.
    """
    cells = [side // scale for side, scale in zip(x.shape[2:], down, strict=True)]
    corners = list(itertools.product(*(tile_starts(side, tile, overlap) for side in cells)))
    if len(corners) == 1:
        return f(x)
    parts = [(corner, f(x[region(corner, [tile] * len(cells), down)])) for corner in corners]
    first = parts[0][1]
    total = first.new_zeros(*first.shape[:2], *(side * scale for side, scale in zip(cells, up, strict=True)))
    weights = first.new_zeros(total.shape[2:])
    for corner, part in parts:
        where = region(corner, [side // scale for side, scale in zip(part.shape[2:], up, strict=True)], up)
        ramps = [ramp(side, overlap * scale, part) for side, scale in zip(part.shape[2:], up, strict=True)]
        weight = reduce(torch.mul, torch.meshgrid(*ramps, indexing="ij"))
        total[where] += weight * part
        weights[where] += weight
    return total / weights


def region(corner: Sequence[int], sides: Sequence[int], scale: Sequence[int]) -> tuple[Any, ...]:
    """Return the index of a box of cells whose sides are `scale` positions."""
    return (..., *(slice(c * s, (c + side) * s) for c, side, s in zip(corner, sides, scale, strict=True)))


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return the starts of tiles that cover `side` cells exactly and share at least `overlap`."""
    if side <= tile:
        return [0]
    number = -(-(side - overlap) // (tile - overlap))
    return [(side - tile) * i // (number - 1) for i in range(number)]


def ramp(side: int, overlap: int, like: Tensor) -> Tensor:
    """Return weights (side,) of a tile's positions: 1 in the middle, falling over `overlap` to both ends, never 0."""
    position = torch.arange(side, device=like.device, dtype=like.dtype)
    edge = torch.minimum(position, side - 1 - position) + 1
    return (edge / (overlap + 1)).clamp(max=1)
