"""Large images through a first stage piece by piece, in the memory of one piece."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.autoencoder.first_stage import FirstStage
from ldm.autoencoder.posterior import DeterministicPosterior, DiagonalGaussian
from ldm.errors import ConfigError


class Tiled(nn.Module):
    """A first stage that encodes and decodes tile by tile, with the signature of the one it wraps.

    tile, overlap: in places of the latent (tile * factor pixels), 0 <= overlap < tile.  Neighbouring tiles share at least `overlap` places,
    over which one fades linearly into the other.  What fits one tile goes through whole; elsewhere normalisation and attention see a tile
    and not the image, so that the result is near the plain one's and not equal to it.  Raises ConfigError for an overlap that does not fit.
    """

    def __init__(self, autoencoder: FirstStage, tile: int = 64, overlap: int = 16):
        super().__init__()
        if not 0 <= overlap < tile:
            raise ConfigError(f"tile={tile} overlap={overlap}: expected 0 <= overlap < tile, in places of the latent")
        self.autoencoder, self.tile, self.overlap = autoencoder, tile, overlap

    def __getattr__(self, name: str):
        """Whatever is not tiled is the wrapped first stage's: factor, z_channels, shift, scale, normalise, identity ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("autoencoder"), name)

    def posterior(self, image: Tensor) -> DiagonalGaussian | DeterministicPosterior:
        """q(z | image), its moments blended. Raises ConfigError for a size the factor does not divide."""
        self.autoencoder.require_size(image)
        f = self.autoencoder.factor
        moments = tiled(
            lambda part: self.autoencoder.posterior(part).moments, image, self.tile * f, self.overlap * f, f, 1
        )
        return self.autoencoder.posterior_of(moments)

    def encode(self, image: Tensor) -> Tensor:
        """z (B, z_channels, h, w) of the posterior's mode."""
        return self.autoencoder.normalise(self.posterior(image).mode)

    def decode(self, z: Tensor) -> Tensor:
        """Image (B, C, H, W), about [-1, 1], of z."""
        return tiled(self.autoencoder.decode, z, self.tile, self.overlap, 1, self.autoencoder.factor)


def tiled(f: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, down: int, up: int) -> Tensor:
    """f, which makes (B, C', H up / down, W up / down) of x (B, C, H, W), applied to tiles at most `tile` high and wide and blended.

    tile, overlap: multiples of `down`.
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
        place = (
            ...,
            slice(top * up // down, top * up // down + height),
            slice(left * up // down, left * up // down + width),
        )
        weight = ramp(height, overlap * up // down, part)[:, None] * ramp(width, overlap * up // down, part)
        total[place] += weight * part
        weights[place] += weight
    return total / weights


def tile_starts(side: int, tile: int, overlap: int, grain: int) -> list[int]:
    """Where tiles begin so that they cover `side`, share at least `overlap` and none reaches beyond the end; multiples of `grain`."""
    if side <= tile:
        return [0]
    number = -(-(side - overlap) // (tile - overlap))
    return [(side - tile) * i // (number - 1) // grain * grain for i in range(number)]


def ramp(side: int, overlap: int, like: Tensor) -> Tensor:
    """Weights (side,) of a tile's places: 1 in the middle, falling linearly towards both ends over `overlap` places, nowhere 0."""
    place = torch.arange(side, device=like.device, dtype=like.dtype)
    edge = torch.minimum(place, side - 1 - place) + 1
    return (edge / (overlap + 1)).clamp(max=1)
