"""Pixel space as a first stage, without weights."""

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
