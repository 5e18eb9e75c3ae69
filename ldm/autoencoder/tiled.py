"""A first stage that processes large images tile by tile, with the memory of one tile."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.autoencoder.first_stage import FirstStage
from ldm.autoencoder.posterior import DeterministicPosterior, DiagonalGaussian
from ldm.errors import ConfigError


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
        f = self.autoencoder.factor
        moments = tiled(
            lambda part: self.autoencoder.posterior(part).moments, image, self.tile * f, self.overlap * f, f, 1
        )
        return self.autoencoder.posterior_of(moments)

    def encode(self, image: Tensor) -> Tensor:
        """Return z (B, z_channels, h, w) of the posterior's mode."""
        return self.autoencoder.normalise(self.posterior(image).mode)

    def decode(self, z: Tensor) -> Tensor:
        """Decode z to an image (B, C, H, W), about [-1, 1]."""
        return tiled(self.autoencoder.decode, z, self.tile, self.overlap, 1, self.autoencoder.factor)


def tiled(f: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, down: int, up: int) -> Tensor:
    """Apply f to tiles of x (B, C, H, W), at most `tile` high and wide, and blend the results.

    f maps (B, C, H, W) to (B, C', H up / down, W up / down).  tile, overlap: multiples of `down`.
    """
    rows, columns = (tile_starts(side, tile, overlap, down) for side in x.shape[-2:])
    if len(rows) == len(columns) == 1:
        return f(x)
    parts = [(top, left, f(x[..., top : top + tile, left : left + tile])) for top in rows for left in columns]
    first = parts[0][2]
    total = first.new_zeros(*first.shape[:-2], *(side * up // down for side in x.shape[-2:]))
    weights = first.new_zeros(total.shape[-2:])
    for top, left, part in parts:
        height, width = part.shape[-2:]
        region = (
            ...,
            slice(top * up // down, top * up // down + height),
            slice(left * up // down, left * up // down + width),
        )
        weight = ramp(height, overlap * up // down, part)[:, None] * ramp(width, overlap * up // down, part)
        total[region] += weight * part
        weights[region] += weight
    return total / weights


def tile_starts(side: int, tile: int, overlap: int, grain: int) -> list[int]:
    """Return the starts, multiples of `grain`, of tiles that cover `side` exactly and share at least `overlap`."""
    if side <= tile:
        return [0]
    number = -(-(side - overlap) // (tile - overlap))
    return [(side - tile) * i // (number - 1) // grain * grain for i in range(number)]


def ramp(side: int, overlap: int, like: Tensor) -> Tensor:
    """Return weights (side,) of a tile's positions: 1 in the middle, falling over `overlap` to both ends, never 0."""
    position = torch.arange(side, device=like.device, dtype=like.dtype)
    edge = torch.minimum(position, side - 1 - position) + 1
    return (edge / (overlap + 1)).clamp(max=1)
