"""Scores of forecasts against closed forms and an independent library's definition."""

import math

import numpy as np
import pytest
import torch

from ldm.errors import ConfigError
from ldm.metrics import forecast


def test_correlation_time_interpolates_the_first_crossing():
    """States a cos(angle) + b sin(angle) of orthogonal fields a and b have the correlation cos(angle) with a."""
    x = 2 * math.pi * torch.arange(16) / 16
    a, b = x.sin(), x.cos()
    correlations = torch.tensor(
        [
            [1.0, 0.9, 0.5, 0.9],  # crosses 0.8 a quarter of the way from state 1 to state 2
            [1.0, 0.95, 0.9, 0.85],  # never
            [0.7, 0.9, 0.9, 0.9],  # at once
            [1.0, 0.8, 0.6, 1.0],  # at state 1, which is not below yet
        ],
        dtype=torch.float64,
    )
    angle = correlations.arccos()[..., None, None]
    drawn = 3 * (a * angle.cos() + b * angle.sin()) + 5
    truth = a.expand_as(drawn)
    torch.testing.assert_close(forecast.correlation(drawn, truth), correlations)
    time = forecast.correlation_time(forecast.correlation(drawn, truth), 0.5)
    torch.testing.assert_close(time, torch.tensor([0.625, 1.5, 0.0, 0.5], dtype=torch.float64))
    touching = torch.tensor([[1.0, 0.75, 0.9], [1.0, 0.5, 0.5]])  # at the threshold is not below it
    assert forecast.correlation_time(touching, 0.5, 0.75).tolist() == [1.0, 0.25]
    drawn[1, 2, 0, 3] = torch.nan
    time = forecast.correlation_time(forecast.correlation(drawn, truth), 0.5)
    assert time[1] == pytest.approx(0.5 * (1 + 0.15 / 1.95))


def test_spectrum_error_is_that_of_the_scaled_waves():
    x, generator = 2 * math.pi * torch.arange(32) / 32, torch.Generator().manual_seed(0)
    truth = torch.randn(3, 4, 1, 32, generator=generator, dtype=torch.float64)
    power = forecast.power_spectrum(truth)
    by_hand = np.abs(np.fft.fft(truth.numpy(), axis=-1)[..., :17]) ** 2 / 32
    np.testing.assert_allclose(power.numpy(), by_hand.mean((0, 1, 2)), rtol=1e-12)
    assert forecast.power_spectrum(2 * (3 * x).sin()[None])[3] == pytest.approx(32)  # (2 / 2 * 32)^2 / 32
    waves = torch.fft.rfft(truth)
    waves[..., 0] *= 7  # the mean does not count
    waves[..., 5], waves[..., 9] = waves[..., 5] * 10, waves[..., 9] / 100
    drawn = torch.fft.irfft(waves, 32)
    assert forecast.log_spectrum_error(drawn, truth) == pytest.approx((2 + 4) / 16)
    assert forecast.log_spectrum_error(drawn, truth, 5) == pytest.approx(2 / 5)
    for waves in (0, 17):
        with pytest.raises(ConfigError, match=f"waves={waves}: expected 1 to 16"):
            forecast.log_spectrum_error(drawn, truth, waves)


def test_crps_is_fair():
    """Its mean is that of infinitely many members, here of a normal distribution (Gneiting & Raftery 2007, eq. 21)."""
    generator, y = torch.Generator().manual_seed(0), 0.75
    members = torch.randn(4, 200_000, generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0)
    density = normal.log_prob(torch.tensor(y)).exp()
    exact = float(y * (2 * normal.cdf(torch.tensor(y)) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    for num in (2, 4):
        score = forecast.crps(members[:num], torch.full((200_000,), y))
        assert float(score.mean()) == pytest.approx(exact, abs=5 * float(score.std()) / math.sqrt(len(score)))
    x, few = members[:, :5].numpy(), forecast.crps(members[:, :5], torch.full((5,), y))
    pairs = np.abs(x[:, None] - x).sum((0, 1)) / (2 * 4 * 3)
    np.testing.assert_allclose(few.numpy(), np.abs(x - y).mean(0) - pairs, rtol=1e-12)
    with pytest.raises(ValueError, match="expected two members"):
        forecast.crps(members[:1], members[0])


def test_spread_equals_error_of_a_calibrated_ensemble():
    """Truth and members of one distribution around a mean of their own at each place."""
    generator = torch.Generator().manual_seed(0)
    mean, *draws = torch.randn(5, 400_000, generator=generator, dtype=torch.float64)
    truth, members = 9 * mean + draws[0], 9 * mean + torch.stack(draws[1:])
    assert float(forecast.spread_over_error(members, truth)) == pytest.approx(1, abs=0.005)
    assert float(forecast.spread_over_error(9 * mean + 0.5 * torch.stack(draws[1:]), truth)) < 0.7
    assert float(forecast.rmse(9 * mean, truth)) == pytest.approx(1, abs=0.005)
    with pytest.raises(ValueError, match="expected two members"):
        forecast.spread_over_error(members[:1], truth)
