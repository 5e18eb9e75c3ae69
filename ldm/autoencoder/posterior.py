"""What a first stage says of an image's latent: a diagonal Gaussian."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Posterior:
    """q(z | image) = N(mean, exp(logvar)), each (B, C, h, w), before the latent's shift and scale (LDM app. G)."""

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def of(moments: Tensor) -> "Posterior":
        """The posterior whose mean and log-variance (clamped to [-30, 20]) are stacked on the channels of moments (B, 2C, h, w)."""
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    @property
    def moments(self) -> Tensor:
        """Mean and log-variance stacked on the channels, (B, 2C, h, w): what a latent cache keeps."""
        return torch.cat([self.mean, self.logvar], dim=1)

    @property
    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, noise standard normal (B, C, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats per image, (B,)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).flatten(1).sum(1)
