"""Sampling grids: descending times (N + 1,) in [0, 1] at which a sampler evaluates the denoiser."""

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError


def trailing(schedule: Schedule, n: int) -> Tensor:
    """Return n steps from t = 1 to 0 on the schedule's entries, spaced from the noise end: (n + 1,) float64.

    Lin et al. 2023, table 2. Raises ConfigError for a schedule without a table or with fewer than n entries.
    """
    T = num_timesteps(schedule, n)
    return _grid((T * torch.arange(n, 0, -1, dtype=torch.float64) / n).round() / T)


def default_grid(schedule: Schedule, n: int) -> Tensor:
    """Return `trailing` for a schedule with a table, `uniform_grid` for one without: (n + 1,) float64."""
    return (trailing if hasattr(schedule, "T") else uniform_grid)(schedule, n)


def leading(schedule: Schedule, n: int, offset: int = 0) -> Tensor:
    """Return n steps on entries i = 0, k, 2k, ... (k = T // n) + offset, then to 0: (n + 1,) float64.

    Song et al. 2021a, appendix D.2, linear. Raises ConfigError for a schedule without a table or with fewer than n
    entries.
    """
    T = num_timesteps(schedule, n)
    return _grid((torch.arange(n - 1, -1, -1, dtype=torch.float64) * (T // n) + offset + 1) / T)


def uniform_grid(schedule: Schedule, n: int) -> Tensor:
    """Return n equal steps from t = 1 to 0: (n + 1,) float64."""
    return torch.linspace(1, 0, n + 1, dtype=torch.float64)


def linspace(schedule: Schedule, n: int) -> Tensor:
    """Return n steps on entries evenly spaced from T - 1 to 0, both included, then to t = 0: (n + 1,) float64.

    Nichol & Dhariwal 2021, section 4. Raises ConfigError for a schedule without a table or with fewer than n entries.
    """
    T = num_timesteps(schedule, n)
    return _grid((torch.linspace(T - 1, 0, n, dtype=torch.float64).round() + 1) / T)


def log_snr(schedule: Schedule, n: int, start: float = 1.0, end: float = 1e-3) -> Tensor:
    """Return n - 1 steps from t = start to end, even in log_snr (Lu et al. 2022a), then one to 0: (n + 1,) float64.

    Raises ConfigError where the schedule has no signal at `start`.
    """
    hi, lo = schedule.log_snr(torch.tensor([start, end], dtype=torch.float64))
    if hi.isinf():
        raise ConfigError(
            f"there is no signal at t = {start} on this schedule, so log_snr cannot be divided evenly; set start=0.999"
        )
    return _grid(schedule.t_from_log_snr(torch.linspace(float(hi), float(lo), n, dtype=torch.float64)))


def karras(schedule: Schedule, n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Return n - 1 steps in sigma / alpha from sigma_max to sigma_min, even in its 1/rho-th power, then one to t = 0.

    Karras et al. 2022, eq. 5. (n + 1,) float64. Raises ConfigError if sigma_max is beyond the schedule.
    """
    ramp = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n, dtype=torch.float64)
    highest = (-schedule.log_snr(torch.ones((), dtype=torch.float64)) / 2).exp()
    if sigma_max > highest * (1 + 1e-6):
        raise ConfigError(
            f"sigma_max {sigma_max} is beyond this schedule, whose sigma / alpha ends at {highest:.4g}; lower sigma_max"
        )
    return _grid(schedule.t_from_log_snr(-2 * rho * ramp.log()).clamp(max=1))


def replace_end(ts: Tensor, end: float) -> Tensor:
    """Replace the last time of a grid: 1/T is Stable Diffusion's "final alpha", 0.04 the last step of SiT's SDE."""
    return torch.cat([ts[:-1], ts.new_tensor([end])])


def start_at(ts: Tensor, start: float) -> Tensor:
    """Return `start` and the times of a grid below it, for image-to-image.

    Raises ConfigError unless start is in (ts[-1], 1].
    """
    if not ts[-1] < start <= 1:
        raise ConfigError(f"strength {start} is not a start time above the grid's end {float(ts[-1]):g} and up to 1")
    return torch.cat([ts.new_tensor([start]), ts[ts < start]])


def _grid(ts: Tensor) -> Tensor:
    return torch.cat([ts, ts.new_zeros(1)])


def num_timesteps(schedule: Schedule, n: int = 1) -> int:
    """Return T of a schedule with a table of at least n entries. Raises ConfigError for any other schedule."""
    T = getattr(schedule, "T", None)
    if T is None:
        raise ConfigError(
            f"{type(schedule).__name__} is continuous, it has no entries 1..T; use the option `uniform` here"
        )
    if not 1 <= n <= T:
        raise ConfigError(f"{n} steps on a schedule of {T} entries; choose 1 to {T}")
    return T
