"""How good forecasts of a field are: correlation time, spectra, and the calibration of ensembles.

Fields are (..., C, L) or (..., C, H, W); forecasts and truths are (B, T, C, ...): B trajectories of T states, the state
at their beginning included.
"""

import torch
from torch import Tensor

from ldm.errors import ConfigError


def correlation(forecast: Tensor, truth: Tensor) -> Tensor:
    """Compute Pearson's correlation over all values of each state (B, T, C, ...): (B, T).

    NaN for a constant state, and for one that is not finite.
    """
    a, b = (x.double().flatten(2) - x.double().flatten(2).mean(-1, keepdim=True) for x in (forecast, truth))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def correlation_time(correlations: Tensor, interval: float, threshold: float = 0.8) -> Tensor:
    """Return the time at which each row of correlations (N, T) first falls below the threshold: (N,).

    interval: time between two states.  The crossing is interpolated linearly between the two states around it; a row
    that stays above has the time of its last state, a lower bound; NaN counts as below.
    Averaged over trajectories this is the mean time; the time of the mean correlation, which Lippe et al. 2023
    (PDE-Refiner), section 4.1, report, is shorter by several units: say which.
    """
    values = correlations.nan_to_num(-1.0, -1.0, -1.0)
    below = values < threshold
    last = values.shape[1] - 1
    after = torch.where(below.any(1), below.int().argmax(1), last).clamp(min=1)[:, None]
    high, low = values.gather(1, after - 1)[:, 0], values.gather(1, after)[:, 0]
    crossing = after[:, 0] - 1 + ((high - threshold) / (high - low)).clamp(0, 1)
    return interval * torch.where(below[:, 0], 0.0, torch.where(below.any(1), crossing, last))


def rmse(forecast: Tensor, truth: Tensor) -> Tensor:
    """Compute the root of the mean squared error over all values: ()."""
    return (forecast.double() - truth.double()).square().mean().sqrt()


def power_spectrum(field: Tensor) -> Tensor:
    """Average the power of fields (..., L) at each wave number over all leading axes: (L // 2 + 1,).

    The power of white noise is its variance at every wave number; both signs of a wave are in one number.
    """
    return torch.fft.rfft(field.double(), norm="ortho").abs().square().flatten(0, -2).mean(0)


def log_spectrum_error(forecast: Tensor, truth: Tensor, waves: int | None = None) -> Tensor:
    """Average |log10(power of the forecast / power of the truth)| over the wave numbers 1 to `waves`: ().

    waves: by default all.  0.04 is an error of 10% of the power.  Raises ConfigError for no wave number.
    """
    highest = truth.shape[-1] // 2 if waves is None else waves
    if not 1 <= highest <= truth.shape[-1] // 2:
        raise ConfigError(
            f"waves={waves}: expected 1 to {truth.shape[-1] // 2}, for fields of {truth.shape[-1]} points"
        )
    ratio = power_spectrum(forecast)[1 : highest + 1] / power_spectrum(truth)[1 : highest + 1]
    return ratio.log10().abs().mean()


def crps(members: Tensor, truth: Tensor) -> Tensor:
    """Compute the continuous ranked probability score of an ensemble (M, ...) at each value of the truth (...).

    The fair estimator (Ferro 2014, eq. 4): unbiased, as if the ensemble had infinitely many members,
    mean |x_i - y| - sum over i < j of |x_i - x_j| / (M (M - 1)).  Raises ValueError for fewer than two members.
    """
    num = len(members)
    if num < 2:
        raise ValueError(f"an ensemble of {num}: expected two members or more")
    members, truth = members.double(), truth.double()
    rank = torch.arange(1, num + 1, dtype=torch.float64, device=members.device) * 2 - num - 1
    pairs = torch.tensordot(rank, members.sort(0).values, 1)  # the sum over i < j of |x_i - x_j|
    return (members - truth).abs().mean(0) - pairs / (num * (num - 1))


def spread_over_error(members: Tensor, truth: Tensor) -> Tensor:
    """Divide the spread of an ensemble (M, ...) by the error of its mean, roots of means over all values: ().

    1 for a calibrated ensemble of any size: the unbiased variance is multiplied by (M + 1) / M (Fortin et al. 2014,
    eq. 15). Below 1: too confident.  Raises ValueError for fewer than two members.
    """
    num = len(members)
    if num < 2:
        raise ValueError(f"an ensemble of {num}: expected two members or more")
    members = members.double()
    spread = members.var(0).mean() * (num + 1) / num
    return spread.sqrt() / rmse(members.mean(0), truth)
