"""Gaussians as data: the score of a mixture with noise is known in closed form, so the picture shows the method and no network's errors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoised
from ldm.diffusion.schedule import Schedule
from ldm.tensors import KeyedNoise


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data of K equally likely Gaussians N(means[k], std^2 I), means (K, D); called as (x_t, t) it is its own exact denoise function."""

    schedule: Schedule
    means: Tensor
    std: float

    def __call__(self, x_t: Tensor, t: Tensor) -> Denoised:
        """E[x0 | x_t] and E[eps | x_t], (B, D) each, at x_t (B, D) and t ()."""
        alpha, _ = self.schedule.alpha_sigma(t)
        x0 = (
            self._shares(x_t, t)[..., None]
            * (self.means + alpha * self.std**2 / self._variance(t) * self._gaps(x_t, t))
        ).sum(1)
        return Denoised(x0.to(x_t), -(self.schedule.alpha_sigma(t)[1] * self.score(x_t, t)).to(x_t))

    def score(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The gradient (B, D) of log p_t at x_t (B, D)."""
        return -(self._shares(x_t, t)[..., None] * self._gaps(x_t, t)).sum(1) / self._variance(t)

    def density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """p_t (B,) at x_t (B, D)."""
        dim, variance = self.means.shape[1], self._variance(t)
        return torch.exp(-self._gaps(x_t, t).square().sum(-1) / (2 * variance)).mean(1) / (2 * math.pi * variance) ** (
            dim / 2
        )

    def sample(self, noise: KeyedNoise) -> Tensor:
        """Data (B, D), float64, for the rows of the noise."""
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
    """`num` Gaussians evenly on a circle in the plane; with the defaults about unit variance a dimension."""
    angle = 2 * math.pi * (torch.arange(num, dtype=torch.float64) + 0.5) / num
    return Mixture(schedule, radius * torch.stack([angle.cos(), angle.sin()], 1), std)
