"""Extract edges (Canny 1986) and scribbles from images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import ConfigError

# divided by 4 so that a step of height 1 has slope 1
SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 4
# offsets (down, right), each 45 degrees further
NEIGHBOURS = (
    (0, 1),
    (1, 1),
    (1, 0),
    (1, -1),
    (0, -1),
    (-1, -1),
    (-1, 0),
    (-1, 1),
)
EQUAL = 1e-5  # slopes that differ by less count as equal


@dataclass(frozen=True)
class Canny:
    """Edge extractor: images (B, C, H, W) in [-1, 1] -> thin edges (B, 3, H, W), 0 or 1 (Canny 1986).

    sigma: standard deviation of the blur, in pixels.
    low, high: thresholds on the slope, in brightness (0 to 1) over two pixels: an edge reaches `high` somewhere and is
    followed as long as it is above `low`. Of two adjacent pixels the brighter one carries the edge.
    Raises ConfigError unless 0 < low <= high and sigma > 0.
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
    """Scribble extractor: images (B, C, H, W) in [-1, 1] -> coarse edges drawn with a thick pen, (B, 3, H, W), 0 or 1.

    sigma, low, high: as for Canny; a wider blur leaves fewer edges.  pen: width in pixels, odd.
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
    """Convert images (B, C, H, W) in [-1, 1] to brightness (B, 1, H, W) in [0, 1].

    RGB: by ITU-R BT.601, else the mean.
    """
    weights = (
        image.new_tensor([0.299, 0.587, 0.114])
        if image.shape[1] == 3
        else image.new_full((image.shape[1],), 1 / image.shape[1])
    )
    return (image.float() * weights.view(1, -1, 1, 1)).sum(1, keepdim=True) / 2 + 0.5


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Blur x (B, 1, H, W) with a Gaussian of standard deviation `sigma` pixels; the border is replicated."""
    reach = math.ceil(3 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1.0, device=x.device) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))


def sobel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the slopes of x (B, 1, H, W) to the right and downwards (Sobel & Feldman 1968)."""
    kernel, padded = SOBEL.to(x.device), F.pad(x, (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernel[None, None]), F.conv2d(padded, kernel.T[None, None])


def non_maximum_suppression(across: Tensor, down: Tensor) -> Tensor:
    """Return the slope's magnitude (B, 1, H, W) where it is a maximum along its direction, one of eight; else 0."""
    length = torch.hypot(across, down)
    sector = (torch.atan2(down, across) / (math.pi / 4)).round().long() % 8
    padded = F.pad(length, (1, 1, 1, 1))
    height, width = length.shape[-2:]
    neighbours = torch.cat(
        [padded[..., 1 + y : 1 + y + height, 1 + x : 1 + x + width] for y, x in NEIGHBOURS], 1
    )  # (B, 8, H, W)
    brighter, darker = neighbours.gather(1, sector), neighbours.roll(4, 1).gather(1, sector)  # opposite each other
    return torch.where((length > brighter + EQUAL) & (length > darker - EQUAL), length, 0.0)


def hysteresis(weak: Tensor, strong: Tensor) -> Tensor:
    """Return the weak pixels (B, 1, H, W) bool that are 8-connected to a strong one."""
    reached = strong & weak
    while True:
        further = (F.max_pool2d(reached.float(), 3, 1, 1) > 0) & weak
        if torch.equal(further, reached):
            return reached
        reached = further
