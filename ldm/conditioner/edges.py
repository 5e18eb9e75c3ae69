"""The edges of pictures (Canny 1986), and what a hand would draw of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import ConfigError

SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4  # a step of 1 is seen as 1
NEIGHBOURS = (
    (0, 1),
    (1, 1),
    (1, 0),
    (1, -1),
    (0, -1),
    (-1, -1),
    (-1, 0),
    (-1, 1),
)  # (down, right), each 45 degrees further
EQUAL = 1e-5  # slopes that differ by less are one


@dataclass(frozen=True)
class Canny:
    """Images (B, C, H, W) in [-1, 1] -> their edges, thin lines, (B, 3, H, W) of 0 and 1 (Canny 1986).

    sigma: of the blur, in pixels.  low, high: slopes, in brightness from 0 to 1 over two pixels: an edge has `high` somewhere and is
    followed as far as it has `low`.  Between two pixels the brighter has the edge.  Raises ConfigError unless 0 < low <= high, sigma > 0.
    """

    sigma: float = 1.0
    low: float = 0.08
    high: float = 0.2
    reads = "image"

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 < self.low <= self.high):
            raise ConfigError(
                f"sigma={self.sigma} low={self.low} high={self.high}: expected sigma > 0 and 0 < low <= high"
            )

    def __call__(self, image: Tensor) -> Tensor:
        across, down = sobel(gaussian_blur(luminance(image), self.sigma))
        ridge = non_maximum_suppression(across, down)
        return hysteresis(ridge >= self.low, ridge >= self.high).to(image).expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class Scribble:
    """Images (B, C, H, W) in [-1, 1] -> their coarse edges as a thick pen would draw them, (B, 3, H, W) of 0 and 1.

    sigma, low, high: as Canny's, a wider blur leaving less.  pen: its width in pixels, odd.
    """

    sigma: float = 2.0
    low: float = 0.05
    high: float = 0.12
    pen: int = 3
    reads = "image"

    def __post_init__(self) -> None:
        if self.pen < 1 or self.pen % 2 == 0:
            raise ConfigError(f"pen={self.pen}: expected an odd number of pixels")

    def __call__(self, image: Tensor) -> Tensor:
        return F.max_pool2d(Canny(self.sigma, self.low, self.high)(image), self.pen, 1, self.pen // 2)


def luminance(image: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, 1, H, W) in [0, 1], by ITU-R BT.601 for three channels."""
    weights = (
        image.new_tensor([0.299, 0.587, 0.114])
        if image.shape[1] == 3
        else image.new_full((image.shape[1],), 1 / image.shape[1])
    )
    return (image.float() * weights.view(1, -1, 1, 1)).sum(1, keepdim=True) / 2 + 0.5


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """x (B, 1, H, W) under a Gaussian of that standard deviation in pixels, the border repeated."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1.0, device=x.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))


def sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """The slope of x (B, 1, H, W) to the right and downwards (Sobel & Feldman 1968)."""
    kernel, padded = SOBEL.to(x.device), F.pad(x, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel[None, None]), F.conv2d(padded, kernel.T[None, None])


def non_maximum_suppression(across: Tensor, down: Tensor) -> Tensor:
    """The slope's length (B, 1, H, W) where it is the largest along its own direction, to the nearest of eight; else 0."""
    length = torch.hypot(across, down)
    sector = (torch.atan2(down, across) / (math.pi / 4)).round().long() % 8
    padded = F.pad(length, (1, 1, 1, 1))
    height, width = length.shape[-2:]
    around = torch.cat(
        [padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in NEIGHBOURS], 1
    )  # (B, 8, H, W)
    brighter, darker = around.gather(1, sector), around.gather(1, (sector + 4) % 8)
    return torch.where((length > brighter + EQUAL) & (length > darker - EQUAL), length, 0.0)


def hysteresis(weak: Tensor, strong: Tensor) -> Tensor:
    """The weak pixels (B, 1, H, W) bool that strong ones lead to, by any of the eight neighbours from one to the next."""
    reached = strong & weak
    while True:
        further = (F.max_pool2d(reached.float(), 3, 1, 1) > 0) & weak
        if torch.equal(further, reached):
            return reached
        reached = further
