"""Conditions as extra channels on the latent's grid: maps, low resolution, masks (LDM sec. 3.3), sources.

All but semantic maps and low resolution take samples of any number of sides: a mask over the frames of a clip, the
state before of a field. A null for an unknown size is (B, channels, 1, 1), which broadcasts to the latent's.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.errors import ConfigError
from ldm.tensors import MAX_POOL, POOL, divide_sides, divides, format_factor, one_for_each


class SemanticMap(nn.Module):
    """Semantic map of an image as input channels: batch["map"] -> concat (B, channels, H/factor, W/factor).

    The map holds classes (B, H, W) int64 or class fractions (B, classes, H, W). Each cell of factor x factor pixels
    gets the fraction of every class in it, then a learned 1x1 convolution without bias (LDM's SpatialRescaler). The
    null is zero, a cell without any class.
    Raises ValueError for a class out of range or a size that `factor` does not divide.
    """

    keys = ("map",)
    context_dim = vector_dim = None

    def __init__(self, factor: int | Sequence[int], classes: int, channels: int = 4):
        super().__init__()
        self.factor, self.classes, self.concat_channels = factor, classes, channels
        self.mix = nn.Conv2d(classes, channels, 1, bias=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        return Condition(
            concat=self.mix(cell_means(self.class_fractions(batch["map"]).to(self.mix.weight), self.factor, "map"))
        )

    def null(self, batch: dict[str, Any]) -> Condition:
        return Condition(
            concat=self.mix.weight.new_zeros(
                num_rows(batch), self.concat_channels, *latent_size(batch.get("map"), self.factor, -2)
            )
        )

    def class_fractions(self, map: Tensor) -> Tensor:
        """Return a map as class fractions (B, classes, H, W)."""
        if map.ndim == 4 and map.is_floating_point() and map.shape[1] == self.classes:
            return map
        if map.ndim != 3 or map.is_floating_point():
            raise ValueError(
                f"map of {tuple(map.shape)} {map.dtype}: expected classes (B, H, W) or shares (B, {self.classes}, H, W)"
            )
        if map.numel() and not 0 <= int(map.min()) <= int(map.max()) < self.classes:
            raise ConfigError(
                f"map with classes {int(map.min())} to {int(map.max())}: expected 0 to {self.classes - 1}"
            )
        return F.one_hot(map.long(), self.classes).movedim(-1, 1).float()


class SpatialMap(nn.Module):
    """Relief, depth map or sketch as input channels.

    batch[key] (B, channels, ...) -> concat (B, channels + 1, ...), sides divided by `factor`.
    Each cell gets the mean of its positions; the last channel is 1. The null is 0 in all channels.
    """

    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, factor: int | Sequence[int], key: str = "relief", channels: int = 1):
        super().__init__()
        self.keys, self.factor, self.concat_channels = (key,), factor, channels + 1
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        mean = cell_means(batch[self.keys[0]].to(self.device_anchor), self.factor, self.keys[0])
        return Condition(concat=torch.cat([mean, torch.ones_like(mean[:, :1])], 1))

    def null(self, batch: dict[str, Any]) -> Condition:
        size = latent_size(batch.get(self.keys[0]), self.factor)
        return Condition(concat=self.device_anchor.new_zeros(num_rows(batch), self.concat_channels, *size))


class LowResolution(nn.Module):
    """Low-resolution image as input channels.

    batch["low_res"] (B, C, H/scale, W/scale) in [-1, 1] -> concat (B, C r^2 + 1, H/factor, W/factor).
    r = factor / scale, at least 1: where low_res is finer than the latent, its r x r pixels become channels; where it
    is coarser, its pixels are repeated. With noise_augmentation > 0 noise is added at a level l up to it, sqrt(1 - l^2)
    x + l eps, keyed by batch["noise"] (Ho et al. 2022, section 4.2); the last channel is l. In training l is uniform in
    [0, noise_augmentation], else it is batch["level"], by default 0. The null is zero at level 1.
    Raises ConfigError if neither of scale and factor divides the other, and for noise_augmentation outside [0, 1).
    """

    keys = ("low_res",)
    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(
        self, factor: int | Sequence[int], image_channels: int, scale: int = 4, noise_augmentation: float = 0.0
    ):
        super().__init__()
        if not isinstance(factor, int):
            raise ConfigError(f"factor={list(factor)}: low_res needs one factor for both sides of an image")
        if factor % scale and scale % factor:
            raise ConfigError(f"scale={scale}: expected a divisor or a multiple of the first stage's factor, {factor}")
        if not 0 <= noise_augmentation < 1:
            raise ConfigError(
                f"noise_augmentation={noise_augmentation}: expected a noise level of at least 0 and below 1"
            )
        self.scale, self.augment, self.channels = scale, noise_augmentation, image_channels
        self.fold, self.repeat = max(factor // scale, 1), max(scale // factor, 1)
        self.concat_channels = image_channels * self.fold**2 + 1
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        image = batch["low_res"].to(self.device_anchor)
        if image.shape[1] != self.channels or image.shape[-2] % self.fold or image.shape[-1] % self.fold:
            raise ConfigError(
                f"low_res of {tuple(image.shape)}: expected {self.channels} channels, "
                f"height and width in multiples of {self.fold}"
            )
        level = self.level(batch, image)
        # the value of the level is not looked at, which would wait for the device
        if (self.training and self.augment) or "level" in batch:
            image = (1 - level**2).sqrt() * image + level * batch["noise"].normal("low_res", image)
        return Condition(concat=self._to_latent_grid(image, level))

    def null(self, batch: dict[str, Any]) -> Condition:
        size = (
            [side * self.fold // self.fold for side in batch["low_res"].shape[-2:]]
            if "low_res" in batch
            else [self.fold] * 2
        )
        zeros = self.device_anchor.new_zeros(num_rows(batch), self.channels, *size)
        concat = self._to_latent_grid(zeros, torch.ones_like(zeros[:, :1, :1, :1]))
        return Condition(concat=concat if "low_res" in batch else concat[:, :, :1, :1])

    def level(self, batch: dict[str, Any], image: Tensor) -> Tensor:
        """Return the noise level of each sample, (B, 1, 1, 1)."""
        template = image[:, 0, 0, 0]
        level = torch.zeros_like(template) + torch.as_tensor(batch.get("level", 0.0)).to(template)
        if self.training and self.augment:
            level = self.augment * batch["noise"].uniform("low_res/level", template)
        return level[:, None, None, None]

    def _to_latent_grid(self, image: Tensor, level: Tensor) -> Tensor:
        """Resample the image and its level to the latent's grid and concatenate them."""
        image = F.pixel_unshuffle(image, self.fold)
        image = torch.cat([image, level.expand(-1, 1, *image.shape[-2:])], 1)
        return image.repeat_interleave(self.repeat, -2).repeat_interleave(self.repeat, -1)


class MaskedImage(nn.Module):
    """Masked image as input channels.

    batch["image"] (B, C, ...) in [-1, 1] and batch["mask"] (B, 1, ...) -> concat (B, 1 + z_channels, ...).
    The mask is 1 where pixels are to be generated. Channel 0 is the mask, 1 if any pixel of the cell is to be
    generated; the others are the latent of the image with those pixels grey (LDM section 4.5; order of channels as in
    Stable Diffusion).
    encode: the first stage, image -> z.  The null masks everything: mask 1, latent 0.
    """

    keys = ("image", "mask")
    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, factor: int | Sequence[int], z_channels: int, encode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.factor, self.encode, self.concat_channels = factor, encode, 1 + z_channels
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        image, mask = batch["image"].to(self.device_anchor), (batch["mask"] > 0.5).to(self.device_anchor)
        if mask.shape != (len(image), 1, *image.shape[2:]):
            raise ValueError(
                f"mask of {tuple(mask.shape)}: expected {(len(image), 1, *image.shape[2:])}, "
                f"the image's size, one channel"
            )
        with torch.no_grad():
            z = self.encode(image * (1 - mask))
        return Condition(concat=torch.cat([max_pool_mask(mask, self.factor), z.to(mask)], 1))

    def null(self, batch: dict[str, Any]) -> Condition:
        concat = self.device_anchor.new_zeros(
            num_rows(batch), self.concat_channels, *latent_size(batch.get("mask"), self.factor)
        )
        concat[:, 0] = 1
        return Condition(concat=concat)


class SourceImage(nn.Module):
    """Image to be edited as input channels: batch["source"] (B, C, ...) -> concat (B, z_channels, ...).

    It is encoded by the first stage, as its posterior's mode (Brooks et al. 2023, section 3.2).
    encode: the first stage, image -> z.  The null is zero.
    """

    keys = ("source",)
    requires: ClassVar = {"source": "degradation=edits"}
    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, factor: int | Sequence[int], z_channels: int, encode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.factor, self.encode, self.concat_channels = factor, encode, z_channels
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        with torch.no_grad():
            return Condition(concat=self.encode(batch["source"].to(self.device_anchor)).to(self.device_anchor))

    def null(self, batch: dict[str, Any]) -> Condition:
        size = latent_size(batch.get("source"), self.factor)
        return Condition(concat=self.device_anchor.new_zeros(num_rows(batch), self.concat_channels, *size))


def cell_means(x: Tensor, factor: int | Sequence[int], name: str) -> Tensor:
    """Average x (B, C, ...) over cells whose sides are `factor`.

    Raises ConfigError for a size that `factor` does not divide.
    """
    sides = x.shape[2:]
    if not divides(factor, sides):
        raise ConfigError(
            f"{name} of {'x'.join(map(str, sides))}: height and width must be multiples of {format_factor(factor)}"
        )
    return POOL[len(sides)](x, one_for_each(factor, len(sides), "factor"))


def max_pool_mask(mask: Tensor, factor: int | Sequence[int]) -> Tensor:
    """Return 1 for every cell with sides `factor` in which the mask (B, 1, ...) is 1 anywhere, else 0."""
    dims = mask.ndim - 2
    return MAX_POOL[dims](mask, one_for_each(factor, dims, "factor"))


def latent_size(sample: Tensor | None, factor: int | Sequence[int], first: int = 2) -> Sequence[int]:
    """Return the sides in cells of a sample, or (1, 1) without one; first: the index of its first side."""
    return (1, 1) if sample is None else divide_sides(sample.shape[first:], factor)
