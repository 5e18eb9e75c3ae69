"""Radial spectra against sums written out, and the ratio of high frequencies against closed forms."""

import cmath
import math

import pytest
import torch
from torch.nn.functional import avg_pool2d

from ldm.errors import ConfigError
from ldm.metrics.spectrum import high_frequency_ratio, radial_power_spectrum

NOISE = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_radial_spectrum_equals_fourier_sums():
    """An image of 6 x 8: rings of width 1/6 cycle per pixel, to the corner at 4.24 of them."""
    height, width = 6, 8
    image = NOISE[:1, :1, :height, :width]
    window = [
        [math.sin(math.pi * y / height) ** 2 * math.sin(math.pi * x / width) ** 2 for x in range(width)]
        for y in range(height)
    ]
    mean = float(image.mean())
    sums, counts = [0.0] * 5, [0] * 5
    for v in range(-3, 3):
        for u in range(-4, 4):
            ring = round(math.hypot(v / height, u / width) * 6)
            waves = [
                (float(image[0, 0, y, x]) - mean)
                * window[y][x]
                * cmath.exp(-2j * math.pi * (v * y / height + u * x / width))
                for y in range(height)
                for x in range(width)
            ]
            sums[ring] += abs(sum(waves)) ** 2
            counts[ring] += 1
    area = sum(value**2 for row in window for value in row)
    expected = torch.tensor([total / count / area for total, count in zip(sums, counts, strict=True)])
    torch.testing.assert_close(radial_power_spectrum(image)[0], expected.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(radial_power_spectrum(image.float())[0], expected.float(), rtol=1e-4, atol=0)


def test_white_noise_has_its_variance_in_every_ring():
    spectrum = radial_power_spectrum(NOISE).mean(0)
    assert spectrum.shape == (24,)
    assert (spectrum[2:-1] - 1).abs().max() < 0.1  # 64 x 3 images, 4 frequencies or more in a ring


def test_high_frequency_ratio_is_square_of_contrast():
    for contrast in (0.5, 1.0, 2.0):  # the mean is no matter
        ratio = high_frequency_ratio(contrast * NOISE + 0.3, NOISE)
        assert float(ratio) == pytest.approx(contrast**2, rel=1e-10)


def test_high_frequency_ratio_separates_blur_from_noise():
    wave = torch.cos(2 * math.pi * 3 / 32 * torch.arange(32)).expand(1, 1, 32, 32)  # below the upper half
    images = wave + 0.1 * NOISE[:, :1].float()
    blurred = avg_pool2d(torch.nn.functional.pad(images, (1, 1, 1, 1), "circular"), 3, 1)
    assert float(high_frequency_ratio(blurred, images)) < 0.15
    assert float(high_frequency_ratio(images + 0.2 * NOISE[:, 1:2], images)) == pytest.approx(5, rel=0.1)
    assert float(high_frequency_ratio(0.5 * wave + 0.1 * NOISE[:, :1], images)) == pytest.approx(1, rel=0.02)


def test_high_frequencies_are_those_above_a_quarter():
    """A wave has power at its own and the two neighbouring frequencies, by the window."""
    low, high = (torch.cos(2 * math.pi * k / 32 * torch.arange(32, dtype=torch.float64)) for k in (7, 10))
    assert float(high_frequency_ratio(NOISE + low, NOISE)) == pytest.approx(1, rel=1e-10)
    assert float(high_frequency_ratio(NOISE + high, NOISE)) > 1.1


def test_spectrum_rejects_small_images():
    with pytest.raises(ConfigError, match="3x8: a spectrum needs sides of 4 px or more"):
        radial_power_spectrum(torch.zeros(1, 1, 3, 8))
