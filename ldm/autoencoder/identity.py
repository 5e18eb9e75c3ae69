"""Pixel space as a first stage, without weights."""

from torch import Tensor, nn

from ldm.autoencoder.first_stage import FirstStage
from ldm.autoencoder.posterior import DeterministicPosterior


class Identity(FirstStage):
    """The first stage whose latent is the image, z = image in [-1, 1]: diffusion in pixel space."""

    def __init__(self, channels: int = 3):
        super().__init__(nn.Identity(), nn.Identity(), channels, 1)

    def posterior_of(self, moments: Tensor) -> DeterministicPosterior:
        return DeterministicPosterior(moments)
