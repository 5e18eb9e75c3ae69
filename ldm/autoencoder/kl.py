"""The KL-regularised autoencoder (LDM sec. 3.1 and app. G)."""

from collections.abc import Callable

from torch import Tensor

from ldm.autoencoder.first_stage import FirstStage, TrainingOutput
from ldm.autoencoder.posterior import DiagonalGaussian

DEAD_CHANNEL_KL = 0.01  # nats per position; a channel with less carries no information about the image


class AutoencoderKL(FirstStage):
    """A first stage whose encoder predicts mean and log-variance of a Gaussian: moments (B, 2 z_channels, h, w)."""

    def posterior_of(self, moments: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian.of(moments)

    def training_forward(self, image: Tensor, normal: Callable[[Tensor], Tensor]) -> TrainingOutput:
        """Encode, sample and decode.

        The penalty `kl` is the divergence from a standard normal in nats per image; diagnostics are nats per position
        for each channel.
        """
        posterior = self.posterior_of(self.encoder(image).to(image.dtype))
        reconstruction = self.decoder(posterior.sample(normal(posterior.mean))).to(image.dtype)
        return TrainingOutput(reconstruction, {"kl": posterior.kl()}, posterior.kl_per_channel().detach())

    def diagnostics(self, values: Tensor) -> dict[str, Tensor]:
        """Return the smallest and largest divergence of a channel, in nats per position, and the count of dead ones."""
        return {
            "kl_channel_min": values.min(),
            "kl_channel_max": values.max(),
            "dead_channels": (values < DEAD_CHANNEL_KL).sum().to(values.dtype),
        }
