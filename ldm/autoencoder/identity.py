"""The data themselves as the latent, without weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.autoencoder.first_stage import FirstStage
from ldm.autoencoder.posterior import DeterministicPosterior
from ldm.errors import ConfigError


class Identity(FirstStage):
    """The first stage whose latent is the image, z = scale * image of images in [-1, 1]: diffusion in pixel space.

    scale: 1 / standard deviation of the images gives z unit variance, as schedules with a fixed least noise need.
    Raises ConfigError unless it is positive.
    """

    def __init__(self, channels: int = 3, scale: float = 1.0):
        super().__init__(nn.Identity(), nn.Identity(), channels, 1)
        if not scale > 0:
            raise ConfigError(f"autoencoder.scale={scale}: expected a positive number")
        self.scale.fill_(scale)

    def posterior_of(self, moments: Tensor) -> DeterministicPosterior:
        return DeterministicPosterior(moments)


class Scaled(Identity):
    """The first stage whose latent is the sample (B, C, ...), each channel times a fixed number.

    A channel with a larger number is decided earlier while sampling.
    scale: (C,), above 0.  Raises ConfigError for other numbers.
    """

    def __init__(self, scale: Sequence[float]):
        if not scale or min(scale) <= 0:
            raise ConfigError(f"autoencoder.scale={list(scale)}: expected a number above 0 for each channel")
        super().__init__(len(scale))
        self.scale.copy_(torch.tensor(list(scale)))
