"""Timestep sampling: densities of t in training. The descending grids of t for sampling are in grids.py.

A density maps u in [0, 1) to t, so that u can be independent draws (`independent`) or evenly spread ones
(`stratified`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.grids import num_timesteps
from ldm.diffusion.schedule import Schedule
from ldm.tensors import KeyedNoise, at_least_float32

Density = Callable[[Tensor, Schedule], Tensor]
Times = Callable[[KeyedNoise, Tensor, Schedule], Tensor]


def discrete(u: Tensor, schedule: Schedule) -> Tensor:
    """Map u to 1/T, 2/T, ..., 1 with equal probabilities (Ho et al. 2020, algorithm 1).

    Raises ConfigError for a schedule without a table.
    """
    T = num_timesteps(schedule)
    return ((u * T).floor() + 1) / T


def uniform(u: Tensor, schedule: Schedule) -> Tensor:
    """Map u to a uniform t on (0, 1]."""
    return 1 - u


def log_normal(u: Tensor, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Map u to t with log(sigma / alpha) normal, truncated at the schedule's noisy end.

    Karras et al. 2022, table 1: P_mean, P_std.
    """
    highest = -schedule.log_snr(torch.ones((), dtype=torch.float64)) / 2
    below = torch.special.ndtr((highest - mean) / std).to(u)
    log_sigma = mean + std * torch.special.ndtri((u * below).clamp(min=2**-24))
    return schedule.t_from_log_snr(-2 * log_sigma).clamp(max=1)


def logit_normal(u: Tensor, schedule: Schedule, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Tensor:
    """Map u to t with logit(t) normal (Esser et al. 2024, eq. 19), then to shift t / (1 + (shift - 1) t) (eq. 23)."""
    t = torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(min=2**-24)))
    return shift * t / (1 + (shift - 1) * t)


def uniform_draws(noise: KeyedNoise, x0: Tensor) -> Tensor:
    """Draw u (B,) in [0, 1) for the time of each row of x0 (B, ...).

    float32, or float64 if x0 is, so that the schedule's coefficients are as precise as the data.
    """
    return noise.uniform("t", x0.new_empty(len(x0), dtype=at_least_float32(x0.dtype)))


def independent(noise: KeyedNoise, x0: Tensor, schedule: Schedule, density: Density) -> Tensor:
    """Draw one independent t (B,) for each row of x0 (B, ...), in the dtype of `uniform_draws`."""
    return density(uniform_draws(noise, x0), schedule)


def stratified(noise: KeyedNoise, x0: Tensor, schedule: Schedule, density: Density) -> Tensor:
    """Draw one t (B,) per row, one row of the global batch in each of as many equal strata.

    In the dtype of `uniform_draws`; cf. Kingma et al. 2021, appendix I.1. The stratum is the row's position in the
    global batch; without one, its position in x0.
    """
    u = uniform_draws(noise, x0)
    position = torch.arange(len(x0)) if noise.position is None else torch.as_tensor(noise.position)
    u = (position.to(u.device) + u) / (noise.global_batch_size or len(x0))
    return density(u.clamp(max=1 - 2**-24), schedule)
