"""Random masks (1, H, W) float32, 1 = to be generated, on which inpainting and outpainting are trained."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor

from ldm.errors import ConfigError

Mask = Callable[[tuple[int, int], Generator], Tensor]  # (height, width), generator -> (1, H, W)


def uniform(draw: Generator, low: float, high: float) -> float:
    """Return a random number in [low, high)."""
    return low + (high - low) * torch.rand((), generator=draw).item()


def randint(draw: Generator, low: int, high: int) -> int:
    """Return a random integer from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=draw))


def strokes(
    size: tuple[int, int],
    draw: Generator,
    times: Sequence[int] = (1, 4),
    corners: Sequence[int] = (2, 6),
    length: Sequence[float] = (0.1, 0.4),
    width: Sequence[float] = (0.05, 0.2),
) -> Tensor:
    """Draw free-form strokes: polygonal chains of random width (Suvorov et al. 2022, LaMa, section 2.3).

    times: range of the number of strokes.  corners: range of the number of bends of each.
    length, width: ranges of a segment's length and of the width, as fractions of the shorter side.
    """
    from PIL import Image, ImageDraw

    height, wide = size
    side = min(size)
    image = Image.new("1", (wide, height))
    brush = ImageDraw.Draw(image)
    for _ in range(randint(draw, *times)):
        x, y = uniform(draw, 0, wide), uniform(draw, 0, height)
        thick = max(1, round(side * uniform(draw, *width)))
        for _ in range(randint(draw, *corners)):
            angle, far = uniform(draw, 0, 2 * math.pi), side * uniform(draw, *length)
            to = (min(max(x + far * math.cos(angle), 0), wide - 1), min(max(y + far * math.sin(angle), 0), height - 1))
            brush.line([(x, y), to], fill=1, width=thick)
            brush.ellipse([to[0] - thick / 2, to[1] - thick / 2, to[0] + thick / 2, to[1] + thick / 2], fill=1)
            x, y = to
    return torch.from_numpy(np.array(image, dtype=np.float32))[None]


def boxes(
    size: tuple[int, int], draw: Generator, times: Sequence[int] = (1, 3), side: Sequence[float] = (0.15, 0.5)
) -> Tensor:
    """Draw rectangles; times: range of their number.  side: range of their sides, as fractions of the mask's."""
    mask = torch.zeros(1, *size)
    for _ in range(randint(draw, *times)):
        height, width = (max(1, round(full_side * uniform(draw, *side))) for full_side in size)
        y, x = randint(draw, 0, size[0] - height), randint(draw, 0, size[1] - width)
        mask[:, y : y + height, x : x + width] = 1
    return mask


def borders(
    size: tuple[int, int], draw: Generator, part: Sequence[float] = (0.125, 0.5), sides: Sequence[int] = (1, 2)
) -> Tensor:
    """Mask what outpainting has to generate: strips along adjacent sides.

    part: range of a strip's width, as a fraction of the height or width.  sides: range of the number of strips.
    """
    mask = torch.zeros(1, *size)
    first = randint(draw, 0, 3)
    for turn in range(randint(draw, *sides)):
        side = (first + turn) % 4  # left, top, right, bottom
        along = mask if side % 2 else mask.transpose(1, 2)
        strip = max(1, round(along.shape[1] * uniform(draw, *part)))
        if side < 2:
            along[:, :strip] = 1
        else:
            along[:, -strip:] = 1
    return mask


def random_choice(size: tuple[int, int], draw: Generator, kinds: Sequence[Mask]) -> Tensor:
    """Return a mask of a random kind; list a kind twice to have it twice as often. Raises ConfigError without kinds."""
    if not kinds:
        raise ConfigError("kinds is empty: expected one kind of mask or more")
    return kinds[randint(draw, 0, len(kinds) - 1)](size, draw)
