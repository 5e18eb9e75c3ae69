"""Random crops, flips and colours of training images, each a function of (seed, purpose, epoch, index) alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ldm.data.color import ColorJitter
from ldm.data.masks import randint, uniform
from ldm.data.shape import parse_size
from ldm.data.wrapper import WrappedDataset
from ldm.errors import ConfigError
from ldm.io.images import COLOUR_CHANNELS

ATTEMPTS = 10  # boxes that RandomResizedCrop draws before it takes the central one


class Box(NamedTuple):
    """A part of an image, in pixels: its upper left corner and its sides."""

    top: int
    left: int
    height: int
    width: int


class Crop(Protocol):
    """A random part of an image.

    size: in pixels, that a part is resized to, one number or [height, width]; None for that of the data set's images.
    """

    @property
    def size(self) -> int | Sequence[int] | None: ...
    def sample(self, height: int, width: int, draw: Generator) -> Box:
        """Choose the part of an image of height x width pixels."""
        ...

    def centre(self, height: int, width: int) -> Box:
        """Return the part that stands for the image where nothing is random, as in evaluation."""
        ...


@dataclass(frozen=True)
class RandomCrop:
    """A part of `size` pixels, one number or [height, width], at a uniformly random position, not resized.

    Raises ConfigError for a side below 1, and for an image that is smaller.
    """

    size: int | Sequence[int]

    def __post_init__(self):
        check_crop_size(self.size)

    def sample(self, height: int, width: int, draw: Generator) -> Box:
        """Choose the part of an image of height x width pixels."""
        h, w = self._sides(height, width)
        return Box(randint(draw, 0, height - h), randint(draw, 0, width - w), h, w)

    def centre(self, height: int, width: int) -> Box:
        """Return the central part of an image of height x width pixels."""
        h, w = self._sides(height, width)
        return Box((height - h) // 2, (width - w) // 2, h, w)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        h, w = parse_size(self.size)
        if height < h or width < w:
            raise ConfigError(
                f"crop.size={self.size}: the images have {height}x{width} pixels; choose a smaller crop, or larger "
                "images with data.size"
            )
        return h, w


@dataclass(frozen=True)
class RandomResizedCrop:
    """A part of random area and shape, resized to `size` pixels (Szegedy et al. 2015, section 6).

    size: one number or [height, width]; None for that of the data set's images.
    scale: range of the part's area, as a fraction of the image's.
    ratio: range of its width / height, log-uniform; a part that does not fit is drawn again, ATTEMPTS times, and then
    replaced by the central one.  Raises ConfigError for ranges that are empty or out of (0, 1] and (0, inf).
    """

    size: int | Sequence[int] | None = None
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        if self.size is not None:
            check_crop_size(self.size, ", or null for the size of the images")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"crop.scale={list(self.scale)}: expected two fractions above 0 and up to 1, in order")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ConfigError(f"crop.ratio={list(self.ratio)}: expected two positive numbers, in order")

    def sample(self, height: int, width: int, draw: Generator) -> Box:
        """Choose the part of an image of height x width pixels."""
        for _ in range(ATTEMPTS):
            area = height * width * uniform(draw, *self.scale)
            ratio = math.exp(uniform(draw, *map(math.log, self.ratio)))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= height and 0 < w <= width:
                return Box(randint(draw, 0, height - h), randint(draw, 0, width - w), h, w)
        return self._largest(height, width, *self.ratio)

    def centre(self, height: int, width: int) -> Box:
        """Return the largest central part of the crop's shape of an image of height x width pixels."""
        h, w = (height, width) if self.size is None else parse_size(self.size)
        return self._largest(height, width, w / h, w / h)

    @staticmethod
    def _largest(height: int, width: int, low: float, high: float) -> Box:
        """Return the largest central part with a width / height from low to high."""
        h, w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
        return Box((height - h) // 2, (width - w) // 2, h, w)


def check_crop_size(size: int | Sequence[int], more: str = "") -> None:
    """Raise ConfigError for a size that is not in whole pixels."""
    try:
        parse_size(size)
    except ConfigError:
        raise ConfigError(f"crop.size={size}: expected 1 pixel or more, or [height,width]{more}") from None


class AugmentedDataset(WrappedDataset):
    """A data set whose training images are randomly flipped, cropped and recoloured, in this order.

    training: whether anything is random; otherwise a batch has the crop's central part of each image, as `pixels` has.
    crop: chooses the part of an image.  flip: probability of a mirror image, besides the data set's own flips.
    color: changes the image's values alone; flips and crops also change the maps of the batch, the tensors of the same
    height and width.
    With a crop, the batch also has these tensors (B, 2) int64, height first: `original_size`, the data set's image, or
    the file's if the data set says it; `crop`, the upper left corner of the part in the image as the data set scales
    it; `crop_size`, its sides before it is resized; `target_size`, its sides then (SDXL, Podell et al. 2023, section
    2.2). Corners are those in the flipped image.
    All choices are functions of (seed, epoch, index). Everything else is the data set's.
    Raises ConfigError for a probability outside [0, 1], for data that are no images, and for data whose images have
    several shapes, or boxes.
    """

    def __init__(
        self,
        dataset: Any,
        training: bool,
        crop: Crop | None = None,
        flip: float = 0.0,
        color: ColorJitter | None = None,
        seed: int = 0,
    ):
        if not 0 <= flip <= 1:
            raise ConfigError(f"augmentation.flip={flip}: expected a probability from 0 to 1")
        if getattr(dataset, "shapes", None) and (crop is not None or flip):
            raise ConfigError(
                "augmentation: images of several shapes are neither cropped nor flipped; "
                "leave crop and flip out, set data.flip=true, or choose data=folder"
            )
        if len(dataset.shape) != 3:
            raise ConfigError(
                f"augmentation: samples of shape {tuple(dataset.shape)} are no images (C, H, W); leave it out"
            )
        if color is not None and dataset.shape[0] not in COLOUR_CHANNELS:
            raise ConfigError(
                f"augmentation.color: expected images of 1 or 3 channels, not {dataset.shape[0]}; leave color out"
            )
        super().__init__(dataset)
        self.training, self.crop, self.color, self.seed = training, crop, color, seed
        self.probability = flip if training else 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the images in a batch."""
        size = self.crop.size if self.crop is not None else None
        return tuple(self.dataset.shape) if size is None else (self.dataset.shape[0], *parse_size(size))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the data set's images."""
        return tuple(self.dataset.shape)

    @property
    def flip(self) -> bool:
        """Whether a batch may have mirror images."""
        return self.dataset.flip or self.probability > 0

    @property
    def changed_by(self) -> list[str]:
        """The options because of which a batch has other images than `pixels` and their mirror images."""
        active = {"augmentation.crop": self.crop, "augmentation.color": self.color} if self.training else {}
        return [name for name, transform in active.items() if transform is not None]

    @property
    def fingerprint(self) -> str:
        """Identity of `pixels`."""
        if self.crop is None:
            return self.dataset.fingerprint
        return f"{self.dataset.fingerprint}-{sha256(repr(self.crop).encode()).hexdigest()[:16]}"

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the samples, (epoch, index) pairs, as the data set gives them, with changed images and maps."""
        batch = dict(self.dataset.batch(samples))
        if self.crop is not None and "boxes" in batch:
            raise ConfigError("augmentation.crop: the boxes of a layout would no longer fit; leave crop out")
        height, width = batch["image"].shape[-2:]
        batch = self._cut(batch, samples, height, width)
        if self.color is not None and self.training:
            draws = (self.generator("color", *sample) for sample in samples)
            batch["image"] = torch.stack([self.color(x, draw) for x, draw in zip(batch["image"], draws, strict=True)])
        return batch

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return a batch without its images, which are read only where there is a crop, that depends on their size."""
        if self.crop is not None:
            return {name: value for name, value in self.batch(samples).items() if name != "image"}
        return self._cut(dict(self.dataset.batch_metadata(samples)), samples, *self.dataset.shape[1:])

    def _cut(
        self, batch: dict[str, Any], samples: Sequence[tuple[int, int]], height: int, width: int
    ) -> dict[str, Any]:
        """Flip and crop the tensors (B, ..., height, width) of a batch, and add what was done to it."""
        if self.crop is None and not self.probability:
            return batch
        flips = [bool(uniform(self.generator("flip", *sample), 0, 1) < self.probability) for sample in samples]
        boxes = [self.box(height, width, *sample) for sample in samples]
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.ndim > 2 and value.shape[-2:] == (height, width):
                rows = zip(value, flips, boxes, strict=True)
                batch[name] = torch.stack([self.part(x.flip(-1) if flip else x, box) for x, flip, box in rows])
        if "flip" in batch:
            batch["flip"] = batch["flip"] ^ torch.tensor(flips, dtype=torch.bool)
        if self.crop is not None:
            whole = torch.tensor([[height, width]]).expand(len(boxes), 2).clone()
            batch["original_size"] = batch.get("original_size", whole)
            corners = torch.tensor([[box.top, box.left] for box in boxes]).reshape(-1, 2)
            batch["crop"] = corners + batch.get("crop", 0)
            batch["crop_size"] = torch.tensor([[box.height, box.width] for box in boxes]).reshape(-1, 2)
            batch["target_size"] = torch.tensor(self.shape[1:]).repeat(len(boxes), 1)
        return batch

    def pixels(self, index: Sequence[int] | Tensor) -> Tensor:
        """Return the crop's central part of each image, (B, *shape) float32 in [-1, 1], never flipped."""
        image = self.dataset.pixels(index)
        return image if self.crop is None else self.part(image, self.crop.centre(*image.shape[-2:]))

    def box(self, height: int, width: int, epoch: int, index: int) -> Box:
        """Return the part of an image of height x width pixels that is used in an epoch."""
        if self.crop is None:
            return Box(0, 0, height, width)
        if not self.training:
            return self.crop.centre(height, width)
        return self.crop.sample(height, width, self.generator("crop", epoch, index))

    def part(self, x: Tensor, box: Box) -> Tensor:
        """Return a part of x (..., H, W), resized if there is a crop."""
        x = x[..., box.top : box.top + box.height, box.left : box.left + box.width]
        return x if self.crop is None else resize(x, self.shape[1:])


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize x (..., H, W) to (height, width) pixels: bilinearly with antialiasing, integers to the nearest pixel."""
    size = tuple(size)
    if tuple(x.shape[-2:]) == size:
        return x
    flat = x.reshape(1, -1, *x.shape[-2:])
    if x.is_floating_point():
        flat = F.interpolate(flat, size, mode="bilinear", antialias=True, align_corners=False)
    else:
        flat = F.interpolate(flat.double(), size, mode="nearest-exact").to(x.dtype)
    return flat.reshape(*x.shape[:-2], *size)
