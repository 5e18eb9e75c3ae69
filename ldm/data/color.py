"""Random changes of the colours of an image, and those changes by a given amount."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ldm.data.masks import uniform
from ldm.errors import ConfigError

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in the grey value (ITU-R BT.601)


@dataclass(frozen=True)
class ColorJitter:
    """Changes of brightness, contrast, saturation and hue by random amounts, in random order.

    brightness, contrast, saturation: the factor is uniform from max(0, 1 - x) to 1 + x.  hue: the shift is uniform from
    -x to x turns, at most 0.5.  Grey images keep saturation and hue.  Raises ConfigError for values out of range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self):
        for name, most in (("brightness", math.inf), ("contrast", math.inf), ("saturation", math.inf), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                limit = "0 or more" if most == math.inf else f"0 to {most:g} turns"
                raise ConfigError(f"color.{name}={getattr(self, name)}: expected {limit}")

    def __call__(self, image: Tensor, draw: Generator) -> Tensor:
        """Return a changed copy of an image (1 or 3, H, W) in [-1, 1]. Raises ConfigError for other shapes."""
        if image.ndim != 3 or len(image) not in (1, 3):
            raise ConfigError(
                f"augmentation.color: expected images of 1 or 3 channels, got {tuple(image.shape)}; leave color out"
            )
        amounts = [uniform(draw, max(0.0, 1 - x), 1 + x) for x in (self.brightness, self.contrast, self.saturation)]
        changes: list[tuple[Callable[[Tensor, float], Tensor], float]] = [
            *zip((adjust_brightness, adjust_contrast, adjust_saturation), amounts, strict=True),
            (adjust_hue, uniform(draw, -self.hue, self.hue)),
        ]
        for i in torch.randperm(len(changes), generator=draw).tolist():
            change, amount = changes[i]
            image = change(image, amount)
        return image


def adjust_brightness(image: Tensor, factor: float) -> Tensor:
    """Multiply the values of an image (C, H, W) in [-1, 1], counted from black, by a factor."""
    return _blend(image, torch.tensor(-1.0), factor)


def adjust_contrast(image: Tensor, factor: float) -> Tensor:
    """Multiply the differences of an image (C, H, W) in [-1, 1] from its mean grey value by a factor."""
    return _blend(image, to_grey(image).mean(), factor)


def adjust_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the differences of an image (C, H, W) in [-1, 1] from its grey values by a factor."""
    return _blend(image, to_grey(image), factor) if len(image) == 3 else image


def adjust_hue(image: Tensor, turns: float) -> Tensor:
    """Shift the hue (of hue, saturation, value) of an image (C, H, W) in [-1, 1] by a part of a turn; grey stays."""
    if len(image) != 3 or not turns:
        return image
    red, green, blue = rgb = (image + 1) / 2
    value, least = rgb.amax(0), rgb.amin(0)
    chroma = value - least
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(  # in sixths of a turn
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = (hue + 6 * turns + torch.tensor([5.0, 3.0, 1.0])[:, None, None].to(image)) % 6
    return 2 * (value - chroma * torch.minimum(sixths, 4 - sixths).clamp(0, 1)) - 1


def to_grey(image: Tensor) -> Tensor:
    """Return the grey values (1, H, W) of an image (1 or 3, H, W), in its units."""
    weights = torch.tensor(LUMA)[:, None, None].to(image)
    return image if len(image) == 1 else (image * weights).sum(0, keepdim=True)


def _blend(image: Tensor, other: Tensor, factor: float) -> Tensor:
    """Return other + factor (image - other), clamped to [-1, 1]."""
    return (other + factor * (image - other)).clamp(-1, 1)
