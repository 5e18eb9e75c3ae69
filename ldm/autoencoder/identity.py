"""Pixel space as a first stage: nothing to train, nothing to load."""

from torch import Tensor, nn

from ldm.autoencoder.first_stage import FirstStage
from ldm.autoencoder.posterior import DeterministicPosterior


class Identity(FirstStage):
    """The image is its own latent, z = image in [-1, 1]: diffusion in pixels."""

    def __init__(self, channels: int = 3):
        super().__init__(nn.Identity(), nn.Identity(), channels, 1)

    def posterior_of(self, moments: Tensor) -> DeterministicPosterior:
        return DeterministicPosterior(moments)
