"""Image conditions as extra channels on the latent's grid: maps, low resolution, masks (LDM sec. 3.3), sources."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.errors import ConfigError


class SemanticMap(nn.Module):
    """Semantic map as input channels: batch["map"] -> concat (B, channels, H/factor, W/factor).

    The map holds classes (B, H, W) int64 or class fractions (B, classes, H, W). Each cell of factor x factor pixels
    gets the fraction of every class in it, then a learned 1x1 convolution without bias (LDM's SpatialRescaler). The
    null is zero, a cell without any class.
    Raises ValueError for a class out of range or a size that `factor` does not divide.
    """

    keys = ("map",)
    requires: ClassVar = {"map": "data with semantic maps, as data=blue_marble"}
    context_dim = vector_dim = None

    def __init__(self, factor: int, classes: int, channels: int = 4):
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
                num_rows(batch), self.concat_channels, *latent_size(batch.get("map"), self.factor)
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

    batch[key] (B, channels, H, W) -> concat (B, channels + 1, H/factor, W/factor).
    Each cell gets the mean of its pixels; the last channel is 1. The null is 0 in all channels.
    """

    requires: ClassVar = {"relief": "data=blue_marble"}
    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, factor: int, key: str = "relief", channels: int = 1):
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
    requires: ClassVar = {"low_res": "degradation=bicubic_x4"}
    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, factor: int, image_channels: int, scale: int = 4, noise_augmentation: float = 0.0):
        super().__init__()
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

    batch["image"] (B, C, H, W) in [-1, 1] and batch["mask"] (B, 1, H, W) -> concat (B, 1 + z_channels, h, w).
    The mask is 1 where pixels are to be generated. Channel 0 is the mask, 1 if any pixel of the cell is to be
    generated; the others are the latent of the image with those pixels grey (LDM section 4.5; order of channels as in
    Stable Diffusion).
    encode: the first stage, image -> z.  The null masks everything: mask 1, latent 0.
    """

    keys = ("image", "mask")
    requires: ClassVar = {"mask": "degradation=mask"}
    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, factor: int, z_channels: int, encode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.factor, self.encode, self.concat_channels = factor, encode, 1 + z_channels
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        image, mask = batch["image"].to(self.device_anchor), (batch["mask"] > 0.5).to(self.device_anchor)
        if mask.shape != (len(image), 1, *image.shape[-2:]):
            raise ValueError(
                f"mask of {tuple(mask.shape)}: expected {(len(image), 1, *image.shape[-2:])}, "
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
    """Image to be edited as input channels: batch["source"] (B, C, H, W) -> concat (B, z_channels, h, w).

    It is encoded by the first stage, as its posterior's mode (Brooks et al. 2023, section 3.2).
    encode: the first stage, image -> z.  The null is zero.
    """

    keys = ("source",)
    requires: ClassVar = {"source": "degradation=edits"}
    context_dim = vector_dim = None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, factor: int, z_channels: int, encode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.factor, self.encode, self.concat_channels = factor, encode, z_channels
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        with torch.no_grad():
            return Condition(concat=self.encode(batch["source"].to(self.device_anchor)).to(self.device_anchor))

    def null(self, batch: dict[str, Any]) -> Condition:
        size = latent_size(batch.get("source"), self.factor)
        return Condition(concat=self.device_anchor.new_zeros(num_rows(batch), self.concat_channels, *size))


def cell_means(x: Tensor, factor: int, name: str) -> Tensor:
    """Average x (B, C, H, W) over cells of factor x factor pixels.

    Raises ConfigError for a size that `factor` does not divide.
    """
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise ConfigError(f"{name} of {x.shape[-2]}x{x.shape[-1]}: height and width must be multiples of {factor}")
    return F.avg_pool2d(x, factor)


def max_pool_mask(mask: Tensor, factor: int) -> Tensor:
    """Return 1 for every cell of factor x factor pixels in which the mask (B, 1, H, W) is 1 anywhere, else 0."""
    return F.max_pool2d(mask, factor)


def latent_size(image: Tensor | None, factor: int) -> Sequence[int]:
    """Return height and width in cells of an image (..., H, W), or (1, 1) without one."""
    return (1, 1) if image is None else [cast(int, side) // factor for side in image.shape[-2:]]
