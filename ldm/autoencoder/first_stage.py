"""The base class of first stages: encoder and decoder of a latent space, and its normalisation."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ldm.autoencoder.calibration import Calibration, Statistics, per_channel
from ldm.autoencoder.posterior import DeterministicPosterior, DiagonalGaussian
from ldm.errors import ConfigError
from ldm.tensors import divides, format_factor, hash_state_dict


class TrainingOutput(NamedTuple):
    """The result of a training forward pass over a batch of images.

    reconstruction: (B, C, ...).  penalties: by name, (B,) each, regularisation of the latent.
    diagnostics: (K,), a mean over the batch, which `FirstStage.diagnostics` takes once it is averaged over all
    processes.
    """

    reconstruction: Tensor
    penalties: dict[str, Tensor]
    diagnostics: Tensor


class FirstStage(nn.Module):
    """An encoder image -> moments, a decoder latent -> image, and the shift and scale that give z unit variance.

    encoder: (B, C, H, W) in [-1, 1] -> moments (B, M, H/factor, W/factor).  decoder: (B, z_channels, h, w) -> (B, C, H,
    W).  Samples with other sides, (B, C, L) or (B, C, F, H, W), need an encoder and a decoder that take them.
    factor: one number for every side, or a list of one for each.
    shift, scale: buffers (z_channels,), 0 and 1 until `calibrate` is called with the training set.
    A subclass defines what its moments mean (`posterior_of`), what comes between latent and decoder (`decode_raw`), and
    its training pass (`training_forward`, `diagnostics`).
    """

    shift: Tensor
    scale: Tensor
    calibrated_on: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, z_channels: int, factor: int | Sequence[int]):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.z_channels = z_channels
        self.factor = factor if isinstance(factor, int) else tuple(factor)
        self.register_buffer("shift", torch.zeros(z_channels))
        self.register_buffer("scale", torch.ones(z_channels))
        self.register_buffer("calibrated_on", torch.zeros((), dtype=torch.long))

    def posterior_of(self, moments: Tensor) -> DiagonalGaussian | DeterministicPosterior:
        """Return the posterior with moments (B, M, ...) of the encoder or of a latent cache."""
        raise NotImplementedError

    def training_forward(self, image: Tensor, normal: Callable[[Tensor], Tensor]) -> TrainingOutput:
        """Encode, sample and decode for training.

        normal: draws standard normal noise shaped like its argument.
        """
        raise NotImplementedError

    def diagnostics(self, values: Tensor) -> dict[str, Tensor]:
        """Return numbers () by name that show whether the latent space is collapsed.

        values: TrainingOutput.diagnostics (K,), averaged over processes.
        """
        raise NotImplementedError

    def decode_raw(self, raw: Tensor) -> Tensor:
        """Decode a latent (B, z_channels, ...) in the posterior's units to an image (B, C, ...)."""
        return self.decoder(raw)

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, whose gradients balance the reconstruction and adversarial losses."""
        return cast(Tensor, self.decoder.last_layer)

    def posterior(self, image: Tensor) -> DiagonalGaussian | DeterministicPosterior:
        """Return q(z | image) before shift and scale. Raises ConfigError for a size the factor does not divide."""
        self.require_size(image)
        return self.posterior_of(self.encoder(image))

    def require_size(self, image: Tensor) -> None:
        """Raise ConfigError unless the factor divides every side of image (B, C, H, W), or of (B, C, ...)."""
        sides = image.shape[2:]
        if not divides(self.factor, sides):
            raise ConfigError(
                f"image is {'x'.join(map(str, sides))}: all sides must be multiples of {format_factor(self.factor)}; "
                "pad or resize it"
            )

    def normalise(self, raw: Tensor) -> Tensor:
        """Convert from the posterior's units to z: (raw - shift) * scale."""
        return (raw - expand_channels(self.shift, raw)) * expand_channels(self.scale, raw)

    def encode(self, image: Tensor) -> Tensor:
        """Return z (B, z_channels, h, w) of the posterior's mode."""
        return self.normalise(self.posterior(image).mode)

    def decode(self, z: Tensor) -> Tensor:
        """Decode z to an image (B, C, H, W), about [-1, 1]."""
        return self.decode_raw(z / expand_channels(self.scale, z) + expand_channels(self.shift, z))

    @torch.no_grad()
    def calibrate(
        self,
        moments: Iterable[Tensor],
        calibration: Calibration = per_channel,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> None:
        """Set shift and scale from batches of moments; by default, samples get mean 0 and variance 1 in every channel.

        total: sums a vector over all processes, if each of them has a share of the moments.  Raises ConfigError if
        there are no moments.
        """
        statistics = Statistics.of(map(self.posterior_of, moments), self.z_channels, total)
        shift, scale = calibration(statistics)
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        self.calibrated_on.fill_(statistics.images)

    def weights_hash(self) -> str:
        """Compute the sha256 of weights, shift and scale, which identifies the latent space in models trained in it."""
        return hash_state_dict(self.state_dict())


def expand_channels(value: Tensor, x: Tensor) -> Tensor:
    """Reshape a number for each channel (C,) so that it broadcasts over x (B, C, ...)."""
    return value.reshape(-1, *[1] * (x.ndim - 2))
