from itertools import pairwise

import pytest
import torch
from torch import nn

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.posterior import DiagonalGaussian
from ldm.autoencoder.tiled import Tiled, ramp, tile_starts, tiled
from ldm.autoencoder.vq import AutoencoderVQ


class Patches(nn.Module):
    """Each place of the latent from its own patch of pixels, so that tiles change nothing."""

    def __init__(self, f: int, z: int, double: bool):
        super().__init__()
        self.net = nn.Conv2d(3, 2 * z if double else z, f, stride=f)

    def forward(self, x):
        return self.net(x)


class Pixels(nn.Module):
    def __init__(self, f: int, z: int):
        super().__init__()
        self.net = nn.ConvTranspose2d(z, 3, f, stride=f)

    def forward(self, z):
        return self.net(z)


def local(cls=AutoencoderKL, f: int = 2):
    torch.manual_seed(0)
    return cls(Patches(f, 4, cls is AutoencoderKL), Pixels(f, 4), 4, f).double().requires_grad_(False)


@pytest.mark.parametrize("cls", [AutoencoderKL, AutoencoderVQ])
@pytest.mark.parametrize("size", [(16, 16), (34, 18), (46, 66)])
def test_tiled_matches_plain_for_local_autoencoder(cls, size):
    plain, image = local(cls), torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    plain.calibrate([plain.posterior(image).moments])
    pieces = Tiled(plain, tile=8, overlap=3)
    z = plain.encode(image)
    torch.testing.assert_close(pieces.encode(image), z)
    torch.testing.assert_close(pieces.posterior(image).moments, plain.posterior(image).moments)
    torch.testing.assert_close(pieces.decode(z), plain.decode(z))


def test_tiled_is_exact_when_image_fits_one_tile():
    plain, image = local(), torch.rand(1, 3, 16, 14, dtype=torch.float64)
    pieces = Tiled(plain, tile=8, overlap=2)
    assert torch.equal(pieces.encode(image), plain.encode(image))
    assert torch.equal(pieces.decode(plain.encode(image)), plain.decode(plain.encode(image)))


def test_tiled_limits_input_size_and_seam_error():
    """A convolution that looks one place further: equal wherever its neighbours are in the same tile."""
    seen = []
    conv = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

    def look(x):
        seen.append(x.shape[-2:])
        return conv(x)

    x = torch.randn(1, 1, 20, 12)
    got, plain = tiled(look, x, 12, 4, (1, 1), (1, 1)), conv(x)
    assert seen == [(12, 12), (12, 12)]
    off = (got - plain).abs().amax((0, 1, 3)) > 1e-6
    assert off.nonzero().flatten().tolist() == [8, 11]  # the last row of the upper tile, the first of the lower one


@pytest.mark.parametrize(("side", "tile", "overlap"), [(20, 8, 3), (16, 4, 1), (9, 8, 0), (16, 8, 0), (8, 8, 2)])
def test_tile_starts_cover_and_overlap(side, tile, overlap):
    at = tile_starts(side, tile, overlap)
    assert at[0] == 0
    assert at[-1] + tile == max(side, tile)
    assert all(0 < b - a <= tile - overlap for a, b in pairwise(at))


def test_tiled_blends_linearly():
    assert ramp(7, 2, torch.zeros(1)).tolist() == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 2 / 3, 1 / 3])
    ends = iter((torch.zeros(1, 1, 1, 6), torch.ones(1, 1, 1, 6)))
    faded = tiled(lambda part: next(ends), torch.zeros(1, 1, 1, 9), 6, 3, (1, 1), (1, 1))
    assert faded.flatten().tolist() == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1])


class Numbered(nn.Module):
    """Return the number of the call at each position of the output, which is `factor` times as large."""

    def __init__(self, factor: float, channels: int):
        super().__init__()
        self.factor, self.channels, self.calls = factor, channels, 0

    def forward(self, x):
        self.calls += 1
        return x.new_full((1, self.channels, *(round(side * self.factor) for side in x.shape[-2:])), self.calls - 1)


@pytest.mark.parametrize("axis", [-2, -1])
def test_tiled_first_stage_blends_over_its_overlap(axis):
    """Two tiles of 10 positions, from 0 and 4, of 2 pixels each: over 2 of the 6 that they share, the weights rise."""
    first_stage = AutoencoderKL(Numbered(0.5, 2), Numbered(2, 1), z_channels=1, factor=2)
    pieces = Tiled(first_stage, tile=10, overlap=2)
    image, z = torch.zeros(1, 1, 2, 28, dtype=torch.float64), torch.zeros(1, 1, 1, 14, dtype=torch.float64)
    found = pieces.posterior(image.transpose(axis, -1)).mean.transpose(axis, -1)
    rising = [k / (3 + k) for k in (1, 2)]  # weights k / 3 and 1
    falling = [1 - x for x in reversed(rising)]
    assert found[0, 0, 0].tolist() == pytest.approx([0] * 4 + rising + [0.5] * 2 + falling + [1] * 4)
    rising = [k / (5 + k) for k in (1, 2, 3, 4)]
    falling = [1 - x for x in reversed(rising)]
    found = pieces.decode(z.transpose(axis, -1)).transpose(axis, -1)
    assert found[0, 0, 0].tolist() == pytest.approx([0] * 8 + rising + [0.5] * 4 + falling + [1] * 8)
    assert torch.equal(found[0, 0, 0], found[0, 0, 1])


def test_tiled_delegates_to_wrapped_autoencoder():
    plain = local()
    pieces = Tiled(plain, 8, 2)
    assert (pieces.factor, pieces.z_channels, pieces.weights_hash()) == (2, 4, plain.weights_hash())
    assert torch.equal(
        pieces.normalise(torch.ones(1, 4, 2, 2).double()), plain.normalise(torch.ones(1, 4, 2, 2).double())
    )
    assert isinstance(pieces.posterior(torch.zeros(1, 3, 32, 32, dtype=torch.float64)), DiagonalGaussian)
    with pytest.raises(AttributeError, match="nothing"):
        _ = pieces.nothing
    with pytest.raises(ValueError, match=r"17x32.*multiples of 2"):
        pieces.posterior(torch.zeros(1, 3, 17, 32, dtype=torch.float64))


@pytest.mark.parametrize("overlap", [-1, 8, 9])
def test_tiled_rejects_invalid_overlap(overlap):
    with pytest.raises(ValueError, match=rf"tile=8 overlap={overlap}"):
        Tiled(local(), 8, overlap)
