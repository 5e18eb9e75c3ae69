"""Reconstruction losses of a first stage, all summed over an image and averaged over the batch, as kl_weight = 1e-6 presumes (LDM)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldm.autoencoder.posterior import Posterior

Error = Callable[[Tensor, Tensor], Tensor]  # reconstruction, image (B, C, H, W) -> (B,), summed over the image


def l1(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Absolute error per image, (B,)."""
    return (reconstruction - image).abs().flatten(1).sum(1)


def l2(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Squared error per image, (B,)."""
    return (reconstruction - image).square().flatten(1).sum(1)


def gradient(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Absolute error of the differences between neighbouring pixels, (B,): sharp edges with no pretrained network (Mathieu 2016)."""
    error = reconstruction - image
    across, down = torch.diff(error, dim=-1).abs(), torch.diff(error, dim=-2).abs()
    return across.flatten(1).sum(1) + down.flatten(1).sum(1)


class ReconstructionLoss(nn.Module):
    """pixel + perceptual_weight * perceptual + kl_weight * KL, each per image: what the generator minimises apart from the adversary.

    perceptual: an Error of its own (a frozen network's features, or `gradient`); None for none.
    """

    def __init__(self, pixel: Error = l1, perceptual: Error | None = None, perceptual_weight: float = 1.0, kl_weight: float = 1e-6):
        super().__init__()
        self.pixel, self.perceptual = pixel, perceptual
        self.perceptual_weight, self.kl_weight = perceptual_weight, kl_weight

    def forward(self, reconstruction: Tensor, image: Tensor, posterior: Posterior) -> dict[str, Tensor]:
        """(B,) per term: rec (pixel and perceptual together), pixel, perceptual, kl."""
        pixel = self.pixel(reconstruction, image)
        perceptual = torch.zeros_like(pixel) if self.perceptual is None else self.perceptual(reconstruction, image)
        kl = posterior.kl()
        rec = pixel + self.perceptual_weight * perceptual
        return {"loss": rec + self.kl_weight * kl, "rec": rec, "pixel": pixel, "perceptual": perceptual, "kl": kl}
