"""Loss of first stages: errors summed over an image, as kl_weight = 1e-6 presumes (LDM), and latent penalties."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError

Error = Callable[[Tensor, Tensor], Tensor]  # reconstruction, image (B, C, ...) -> (B,), summed over the image


def l1(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Compute the absolute error per image, (B,)."""
    return (reconstruction - image).abs().flatten(1).sum(1)


def l2(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Compute the squared error per image, (B,)."""
    return (reconstruction - image).square().flatten(1).sum(1)


def cross_entropy(logits: Tensor, image: Tensor) -> Tensor:
    """Compute the cross-entropy in nats of one-hot samples (B, symbols, L), whose symbol is the largest: (B,)."""
    return torch.nn.functional.cross_entropy(logits, image.argmax(1), reduction="none").flatten(1).sum(1)


def gradient_loss(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Compute the absolute error of the differences between neighbours along every side, (B,).

    It sharpens edges without a pretrained network (Mathieu 2016); of a clip it is also the error of its motion.
    """
    error = reconstruction - image
    sides = reversed(range(2, error.ndim))
    return torch.stack([torch.diff(error, dim=side).abs().flatten(1).sum(1) for side in sides]).sum(0)


class ReconstructionLoss(nn.Module):
    """The generator's loss without its adversarial term: pixel + perceptual_weight * perceptual + latent penalties.

    perceptual: an Error (a frozen network's features, or `gradient_loss`), or None.
    Each weight has the meaning of its paper's code, whatever the reduction: kl_weight weights nats per image against an
    error summed over the image (LDM: 1e-6), codebook_weight a mean over the latent against a mean over the image
    (VQGAN: 1).
    reduction: `sum` over the image (LDM's KL models), or `mean`, the same divided by the image's size (LDM's VQ
    models).
    """

    def __init__(
        self,
        pixel: Error = l1,
        perceptual: Error | None = None,
        perceptual_weight: float = 1.0,
        # against means instead of sums it would be kl_weight * latent / image: at f = 8, 256 px 1e-6 * 4096 / 196608 =
        # 2.1e-8
        kl_weight: float = 1e-6,
        codebook_weight: float = 1.0,
        reduction: Literal["sum", "mean"] = "sum",
    ):
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ConfigError(f"reduction={reduction}: expected sum (over the image) or mean")
        self.pixel, self.perceptual = pixel, perceptual
        self.perceptual_weight, self.kl_weight, self.codebook_weight = perceptual_weight, kl_weight, codebook_weight
        self.reduction = reduction

    def forward(self, reconstruction: Tensor, image: Tensor, penalties: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (B,) per term: loss, rec, pixel, perceptual, and the penalties.

        rec is pixel and perceptual together; the first four are reduced by `reduction`.
        """
        size = image[0].numel()
        weights = {"kl": self.kl_weight, "codebook": self.codebook_weight * size}
        pixel = self.pixel(reconstruction, image)
        perceptual = torch.zeros_like(pixel) if self.perceptual is None else self.perceptual(reconstruction, image)
        rec = pixel + self.perceptual_weight * perceptual
        loss = rec
        for name, penalty in penalties.items():
            loss = loss + weights[name] * penalty
        errors = {"loss": loss, "rec": rec, "pixel": pixel, "perceptual": perceptual}
        if self.reduction == "mean":
            errors = {name: error / size for name, error in errors.items()}
        return {**errors, **penalties}
