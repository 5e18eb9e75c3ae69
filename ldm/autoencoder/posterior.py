"""The posterior of an image's latent: a diagonal Gaussian, or a point."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z | image) = N(mean, exp(logvar)), each (B, C, h, w), before the latent's shift and scale (LDM app. G)."""

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def of(moments: Tensor) -> "DiagonalGaussian":
        """Build the posterior from moments (B, 2C, h, w): mean and log-variance (clamped to [-30, 20]) as channels."""
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    @property
    def moments(self) -> Tensor:
        """Mean and log-variance along the channels, (B, 2C, h, w), as a latent cache stores them."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def mode(self) -> Tensor:
        return self.mean

    @property
    def variance(self) -> Tensor:
        return self.logvar.exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std * noise, noise standard normal (B, C, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Compute KL(q || N(0, I)) in nats per image, (B,)."""
        return self._divergence().flatten(1).sum(1)

    def kl_per_channel(self) -> Tensor:
        """Compute KL(q || N(0, I)) per channel in nats per position of the latent, averaged over the batch, (C,)."""
        return self._divergence().mean((0, *range(2, self.mean.ndim)))

    def _divergence(self) -> Tensor:
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)


@dataclass(frozen=True)
class DeterministicPosterior:
    """A posterior without variance, as those of VQ and of pixel space: every sample is the mean (B, C, h, w)."""

    mean: Tensor

    @property
    def moments(self) -> Tensor:
        """The mean only, (B, C, h, w), as a latent cache stores it."""
        return self.mean

    @property
    def mode(self) -> Tensor:
        return self.mean

    @property
    def variance(self) -> Tensor:
        return torch.zeros_like(self.mean)

    def sample(self, noise: Tensor) -> Tensor:
        """Return the mean; noise is ignored."""
        return self.mean
