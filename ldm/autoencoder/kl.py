"""The KL-regularised autoencoder, owner of the latent space and of its normalisation (LDM sec. 3.1 and app. G)."""

from collections.abc import Iterable
from hashlib import sha256

import torch
from torch import Tensor, nn

from ldm.autoencoder.posterior import Posterior


class AutoencoderKL(nn.Module):
    """An encoder image -> moments and a decoder latent -> image, with the shift and scale that give the latent z unit variance.

    encoder: (B, C, H, W) in [-1, 1] -> (B, 2 z_channels, H/factor, W/factor).  decoder: (B, z_channels, h, w) -> (B, C, H, W).
    shift, scale: buffers (z_channels,), 0 and 1 until `calibrate` has seen the training set.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, z_channels: int, factor: int):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.z_channels, self.factor = z_channels, factor
        self.register_buffer("shift", torch.zeros(z_channels))
        self.register_buffer("scale", torch.ones(z_channels))
        self.register_buffer("calibrated_on", torch.zeros((), dtype=torch.long))

    def posterior(self, image: Tensor) -> Posterior:
        """q(z | image) before shift and scale. Raises ValueError for a size the factor does not divide."""
        if image.shape[-1] % self.factor or image.shape[-2] % self.factor:
            height, width = image.shape[-2:]
            raise ValueError(f"image is {height}x{width}: height and width must be multiples of {self.factor}; pad or resize it")
        return Posterior.of(self.encoder(image))

    def normalise(self, raw: Tensor) -> Tensor:
        """From the posterior's units to z: (raw - shift) * scale."""
        return (raw - self._per_channel(self.shift)) * self._per_channel(self.scale)

    def encode(self, image: Tensor) -> Tensor:
        """z (B, z_channels, h, w) of the posterior's mode."""
        return self.normalise(self.posterior(image).mode)

    def decode(self, z: Tensor) -> Tensor:
        """Image (B, C, H, W), about [-1, 1], of z."""
        return self.decoder(z / self._per_channel(self.scale) + self._per_channel(self.shift))

    @torch.no_grad()
    def calibrate(self, moments: Iterable[Tensor]) -> None:
        """Set shift and scale so that posterior samples over the given batches of moments have mean 0 and variance 1 in every channel."""
        count, first, second = 0, torch.zeros(self.z_channels).double(), torch.zeros(self.z_channels).double()
        images = 0
        for batch in moments:
            posterior = Posterior.of(batch.double().cpu())
            first += posterior.mean.sum((0, 2, 3))
            second += (posterior.mean.square() + posterior.logvar.exp()).sum((0, 2, 3))
            count += posterior.mean[:, 0].numel()
            images += len(batch)
        if not images:
            raise ValueError("calibrate was given no latents: the data set is empty")
        mean = first / count
        self.shift.copy_(mean)
        self.scale.copy_((second / count - mean.square()).rsqrt())
        self.calibrated_on.fill_(images)

    def identity(self) -> str:
        """sha256 of the weights, shift and scale: the name of this latent space, carried by whatever is trained in it."""
        digest = sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _per_channel(self, value: Tensor) -> Tensor:
        return value[:, None, None]
