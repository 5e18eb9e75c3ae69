"""A latent diffusion model: a first stage, a conditioner and a denoiser."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioner.compose import condition_or_null
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import ConfigError
from ldm.tensors import divide_sides, divides, format_factor


class LatentDiffusion(nn.Module):
    """A first stage, a conditioner and a denoiser: everything needed to sample an image from text (LDM fig. 3).

    autoencoder: frozen, unless `unfreeze_first_stage` is called; has posterior, normalise, encode, decode.
    conditioner: batch -> Condition.  denoiser: works on z (B, C, ...).
    size: sides of the samples it was trained on: (height, width) in pixels for images.
    """

    autoencoder: Any
    conditioner: Any

    def __init__(self, autoencoder: nn.Module, conditioner: nn.Module, denoiser: Denoiser, size: tuple[int, ...]):
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.conditioner, self.denoiser, self.size = conditioner, denoiser, size

    def train(self, mode: bool = True) -> "LatentDiffusion":
        super().train(mode)
        self.autoencoder.eval()
        return self

    def unfreeze_first_stage(self) -> None:
        """Make the first stage's parameters trainable, for an objective that trains them; it stays in evaluation mode.

        Its shift and scale stay as they are.
        """
        self.autoencoder.requires_grad_(True)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def latent_shape(self, num: int, size: Sequence[int] | None = None) -> tuple[int, ...]:
        """Return the shape of z for `num` samples with these sides, by default those of the training data.

        Raises ConfigError for another number of sides, and for sides that the first stage's factor does not divide.
        """
        f, sides = self.autoencoder.factor, tuple(size or self.size)
        if len(sides) != len(self.size):
            raise ConfigError(f"size=[{','.join(map(str, sides))}]: expected {len(self.size)} sides")
        if min(divide_sides(sides, f)) < 1 or not divides(f, sides):
            raise ConfigError(
                f"size=[{','.join(map(str, sides))}]: all sides must be multiples of {format_factor(f)}, "
                "the first stage's factor"
            )
        return num, self.autoencoder.z_channels, *divide_sides(sides, f)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        return self.autoencoder.encode(image)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.autoencoder.decode(z).clamp(-1, 1)

    def condition(self, batch: dict[str, Any]) -> Condition:
        """Return the condition of a batch; the null condition if the batch has none of the conditioner's keys."""
        return condition_or_null(self.conditioner, batch)

    def null_condition(self, batch: dict[str, Any]) -> Condition:
        return self.conditioner.null(batch)
