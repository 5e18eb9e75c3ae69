"""Gaussian mixtures as data: their score is known exactly, so figures show the method, not a network's errors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.tensors import KeyedNoise


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data of K equally likely Gaussians N(means[k], std^2 I), with means (K, D).

    Called as (x_t, t) it is its own exact denoise function.
    """

    schedule: Schedule
    means: Tensor
    std: float

    def __call__(self, x_t: Tensor, t: Tensor) -> Denoised:
        """Return E[x0 | x_t] and E[eps | x_t], (B, D) each, for x_t (B, D) and t ()."""
        alpha, _ = self.schedule.alpha_sigma(t)
        x0 = (
            self._shares(x_t, t)[..., None]
            * (self.means + alpha * self.std**2 / self._variance(t) * self._gaps(x_t, t))
        ).sum(1)
        return Denoised(x0.to(x_t), -(self.schedule.alpha_sigma(t)[1] * self.score(x_t, t)).to(x_t))

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the gradient (B, D) of log p_t at x_t (B, D)."""
        return -(self._shares(x_t, t)[..., None] * self._gaps(x_t, t)).sum(1) / self._variance(t)

    def density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return p_t (B,) at x_t (B, D)."""
        dim, variance = self.means.shape[1], self._variance(t)
        exponent = -self._gaps(x_t, t).square().sum(-1) / (2 * variance)
        return torch.exp(exponent).mean(1) / (2 * math.pi * variance) ** (dim / 2)

    def sample(self, noise: KeyedNoise) -> Tensor:
        """Sample data (B, D), float64, for the rows of the noise."""
        which = (noise.uniform("which", torch.empty(len(noise), 1)) * len(self.means)).long().squeeze(1)
        return self.means[which] + self.std * noise.normal("within", self.means[which])

    def _variance(self, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (alpha * self.std) ** 2 + sigma**2

    def _gaps(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t.to(self.means)[:, None] - self.schedule.alpha_sigma(t)[0] * self.means  # (B, K, D)

    def _shares(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.softmax(-self._gaps(x_t, t).square().sum(-1) / (2 * self._variance(t)), dim=1)  # (B, K)


def ring(schedule: Schedule, num: int = 8, radius: float = 1.3, std: float = 0.12) -> Mixture:
    """Return `num` Gaussians evenly spaced on a circle; the defaults have about unit variance per dimension."""
    angle = 2 * math.pi * (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return Mixture(schedule, radius * torch.stack([angle.cos(), angle.sin()], 1), std)
