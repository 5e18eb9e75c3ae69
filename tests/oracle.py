"""The exact denoiser of Gaussian data N(mean, std^2), the exact solution of its ODE, and exact moments of what a
sampler returns.

For such data everything is affine in x_t, so a sampler's error, order, mean and variance are known without training or
chance.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.tensors import expand


@dataclass(frozen=True)
class Gaussian:
    """Data with independent coordinates N(mean, std^2); called as (x_t, t) it is its own exact denoise function."""

    schedule: Schedule
    mean: float = 0.6
    std: float = 0.35

    def __call__(self, x_t: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t))
        total = (alpha * self.std) ** 2 + sigma**2
        x0 = self.mean + alpha * self.std**2 / total * (x_t - alpha * self.mean)  # E[x0 | x_t]
        return Denoised(x0, sigma / total * (x_t - alpha * self.mean))  # E[eps | x_t]

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of x_t."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return alpha * self.mean, (alpha * self.std) ** 2 + sigma**2

    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The exact solution at s of the probability-flow ODE through x at t: it keeps the number of standard
        deviations from the mean.
        """
        (mean_t, var_t), (mean_s, var_s) = self.moments(t), self.moments(s)
        return mean_s + (var_s / var_t).sqrt() * (x - mean_t)

    def posterior_variance(self, t: Tensor) -> Tensor:
        """Var[x0 | x_t]."""
        sigma = self.schedule.alpha_sigma(t)[1]
        return (self.std * sigma) ** 2 / self.moments(t)[1]


def affine(
    sampler: Callable, denoise: Callable, schedule: Schedule, ts: Tensor, draws: int
) -> tuple[float, float, float]:
    """(a, b, c) of an affine sampler's result a x + b + c z, z standard normal: it is run once on probes, with no
    randomness at all.

    Row 0 starts at 0 and row 1 at 1 without noise; row 2 + k starts at 0 and draws 1 as its k-th draw. draws: the
    number expected.
    """
    k = 0

    def noise(x: Tensor) -> Tensor:
        nonlocal k
        k += 1
        return torch.zeros_like(x).index_fill_(0, torch.tensor([k + 1]), 1.0)

    x = torch.zeros(2 + draws, 1, dtype=torch.float64)
    x[1] = 1
    y = sampler(denoise, schedule, x, ts, noise).squeeze(1)
    assert k == draws, f"{k} draws, {draws} expected"
    return float(y[1] - y[0]), float(y[0]), float((y[2:] - y[0]).norm())
