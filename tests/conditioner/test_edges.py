"""Canny's edges against outlines that are known, and each of its steps."""

import math

import pytest
import torch

from ldm.conditioner.edges import (
    Canny,
    Scribble,
    gaussian_blur,
    hysteresis,
    luminance,
    non_maximum_suppression,
    sobel,
)


def square(low=-1.0, high=1.0, size=40, start=10, end=30):
    image = torch.full((1, 3, size, size), low)
    image[:, :, start:end, start:end] = high
    return image


def outline(size=40, start=10, end=30):
    ring = torch.zeros(size, size)
    ring[start:end, start:end] = 1
    ring[start + 1 : end - 1, start + 1 : end - 1] = 0
    return ring


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.4])
def test_canny_edge_of_square_is_its_outline(sigma):
    found = Canny(sigma=sigma)(square())
    assert found.shape == (1, 3, 40, 40)
    assert torch.equal(found[0, 0], found[0, 2])
    wrong = (found[0, 0] != outline()).nonzero()
    corners = torch.tensor([[y, x] for y in (10, 29) for x in (10, 29)])
    assert (
        torch.cdist(wrong.float(), corners.float(), p=float("inf")).min(1).values.le(2).all()
    )  # a blur rounds the corners, nothing else
    dark = Canny(sigma=sigma)(-square())[0, 0]  # a dark square on bright ground: the brighter side is outside
    assert torch.equal(dark[9, 16:24], torch.ones(8))
    assert dark[10, 16:24].sum() == 0


def test_canny_respects_thresholds():
    assert Canny()(torch.full((2, 1, 16, 16), 0.3)).sum() == 0
    faint = square(0.0, 0.2)
    assert Canny(low=0.05, high=0.1)(faint).sum() == 0  # the slope of a step of 0.1, blurred, is 0.048
    assert Canny(low=0.02, high=0.04)(faint).sum() > 100


def test_canny_diagonal_edge_is_connected():
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    found = Canny()((x + y < 40).float()[None, None] * 2 - 1)[0, 0]
    assert torch.equal(found[5:35], ((x + y == 39) | (x + y == 40)).float()[5:35])


def test_hysteresis_follows_weak_pixels_from_strong():
    weak = torch.zeros(1, 1, 5, 12, dtype=torch.bool)
    weak[0, 0, 2, 1:6] = weak[0, 0, 3, 6] = weak[0, 0, 0, 9:] = True
    strong = torch.zeros_like(weak)
    strong[0, 0, 2, 1] = True
    reached = hysteresis(weak, strong)
    assert reached.sum() == 6
    assert reached[0, 0, 3, 6]
    assert not reached[0, 0, 0].any()


def test_sobel_is_exact_on_ramp_and_blur_preserves_mean():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16) * 0.1
    across, down = sobel(ramp)
    assert torch.allclose(across[..., 1:-1], torch.full((1, 1, 16, 14), 0.2))
    assert down.abs().max() < 1e-6
    x = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    flat = torch.nn.functional.pad(x, (9, 9, 9, 9))
    assert gaussian_blur(flat, 1.0).sum() == pytest.approx(float(flat.sum()), rel=1e-5)
    assert non_maximum_suppression(*sobel(gaussian_blur(flat, 1.0))).count_nonzero() > 0


def test_luminance_weighs_rgb_by_bt601_and_averages_other_channels():
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [0.2, 0.2, 0.2]]).T[None, :, None]
    torch.testing.assert_close(luminance(colours)[0, 0, 0], torch.tensor([0.299, 0.587, 0.114, 0.6]))
    two = torch.tensor([[1.0, -1], [-0.5, 0.7], [-1, -1]]).T[None, :, None]
    torch.testing.assert_close(luminance(two)[0, 0, 0], torch.tensor([0.5, 0.55, 0.0]))


def test_blur_of_point_is_gaussian_of_three_sigma():
    point = torch.zeros(1, 1, 21, 21)
    point[..., 10, 10] = 1
    taps = torch.tensor([math.exp(-((k / 1.5) ** 2) / 2) * (abs(k) <= 5) for k in range(-10, 11)])  # 5 = ceil(4.5)
    torch.testing.assert_close(gaussian_blur(point, 1.5)[0, 0], torch.outer(taps, taps) / taps.sum() ** 2)


@pytest.mark.parametrize("sector", range(8))
def test_non_maximum_suppression_compares_along_slope(sector):
    """Of two equal neighbours along the slope the one that it points to remains; across the slope nothing is compared.

    Sector k is k times 45 degrees clockwise from rightwards, as rows go down.
    """
    x, y = (round(f(sector * math.pi / 4)) for f in (math.cos, math.sin))
    angle = sector * math.pi / 4 + 0.3  # within 22.5 degrees = 0.39 of the sector's own
    length = torch.zeros(7, 7)
    length[3 - y, 3 - x], length[3 + 2 * y, 3 + 2 * x] = 0.5, 0.7
    length[3, 3] = length[3 + y, 3 + x] = 1.0
    length[3 - x, 3 + y] = 2.0  # beside it, across the slope, and a maximum too
    kept = non_maximum_suppression(math.cos(angle) * length[None, None], math.sin(angle) * length[None, None])[0, 0]
    expected = torch.zeros(7, 7)
    expected[3 + y, 3 + x], expected[3 - x, 3 + y] = 1.0, 2.0
    torch.testing.assert_close(kept, expected)


def test_scribble_is_thicker_and_sparser_than_canny():
    generator = torch.Generator().manual_seed(0)
    image = square() + 0.6 * torch.randn(1, 1, 40, 40, generator=generator)
    fine, coarse = Canny()(image), Scribble()(image)
    assert Scribble(pen=1)(image)[0, 0].sum() < fine[0, 0].sum()
    near = torch.nn.functional.max_pool2d(coarse, 3, 1, 1)[0, 0]
    assert near[outline() > 0].mean() > 0.9
    assert set(coarse.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("bad", [{"sigma": 0.0}, {"low": 0.3}, {"low": 0.0}])
def test_edge_extractors_reject_invalid_thresholds(bad):
    with pytest.raises(ValueError, match="expected sigma > 0 and 0 < low <= high"):
        Canny(**bad)
    with pytest.raises(ValueError, match="pen=2"):
        Scribble(pen=2)
