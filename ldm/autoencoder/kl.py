"""The KL-regularised autoencoder (LDM sec. 3.1 and app. G)."""

from collections.abc import Callable

from torch import Tensor

from ldm.autoencoder.first_stage import FirstStage, TrainingOutput
from ldm.autoencoder.posterior import DiagonalGaussian

DEAD = 0.01  # nats per place: a channel that says less of its image than this says nothing


class AutoencoderKL(FirstStage):
    """A first stage whose encoder says mean and log-variance of a Gaussian: moments (B, 2 z_channels, h, w)."""

    def posterior_of(self, moments: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.of(moments)

    def training_forward(self, image: Tensor, normal: Callable[[Tensor], Tensor]) -> TrainingOutput:
        """The penalty `kl` is the divergence from a standard normal in nats per image; vitals are nats per place for each channel."""
        posterior = self.posterior_of(self.encoder(image).to(image.dtype))
        reconstruction = self.decoder(posterior.sample(normal(posterior.mean))).to(image.dtype)
        return TrainingOutput(reconstruction, {"kl": posterior.kl()}, posterior.kl_per_channel().detach())

    def diagnostics(self, vitals: Tensor) -> dict[str, Tensor]:
        """Smallest and largest divergence of a channel in nats per place, and the number of dead channels."""
        return {
            "kl_channel_min": vitals.min(),
            "kl_channel_max": vitals.max(),
            "dead_channels": (vitals < DEAD).sum().to(vitals.dtype),
        }
