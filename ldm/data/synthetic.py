"""Ten classes of simple shapes, rendered: a data set without a download, for smoke runs and tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.data.memory import InMemoryDataset
from ldm.data.shape import parse_size
from ldm.errors import ConfigError
from ldm.tensors import derive_seed

SHAPES = ("disc", "ring", "square", "frame", "cross", "bar", "column", "diamond", "triangle", "checkers")
CAPTIONS = ("a photo of a {}", "a white {} on black", "{}", "one {} of some size")


class Synthetic(InMemoryDataset):
    """`num` grey images of ten shapes: image (1, H, W) in [-1, 1], labels 0..9 in turn, split train or test.

    size: in pixels, one number or [height, width].
    """

    def __init__(
        self,
        split: str = "train",
        num: int = 512,
        size: int | Sequence[int] = 32,
        seed: int = 0,
        flip: bool = False,
    ):
        if split not in ("train", "test"):
            raise ConfigError(f"split={split!r}: expected train or test")
        if num < 1:
            raise ConfigError(f"num={num}: expected at least one image")
        labels = torch.arange(num) % len(SHAPES)
        captions = {name: [text.format(name) for text in CAPTIONS] for name in SHAPES}
        super().__init__(f"synthetic-{split}", render(labels, size, derive_seed(split)), labels, captions, seed, flip)


def render(labels: Tensor, size: int | Sequence[int], seed: int) -> Tensor:
    """Render one shape for each label (N,): (N, 1, H, W) uint8, with edges one pixel soft.

    Centre, radius and grey level are random.
    """
    n, (height, width) = len(labels), parse_size(size)
    centre, radius, grey = torch.rand(n, 4, 1, 1, generator=torch.Generator().manual_seed(seed)).split((2, 1, 1), 1)
    radius = min(height, width) * (0.2 + 0.15 * radius)
    cy, cx = (side / 2 + (0.2 * side) * (c - 0.5) for side, c in zip((height, width), centre.unbind(1), strict=True))
    y, x = torch.arange(height)[:, None] + 0.5 - cy, torch.arange(width) + 0.5 - cx
    y, x = y.expand(n, height, width), x.expand(n, height, width)
    r, thin = radius[:, 0], radius[:, 0] / 3
    round_, box, tilted = torch.hypot(x, y), torch.maximum(x.abs(), y.abs()), x.abs() + y.abs()
    distance = torch.stack(  # signed distance to the edge, in pixels, negative inside
        [
            round_ - r,
            (round_ - r).abs() - thin / 2,
            box - r,
            (box - r).abs() - thin / 2,
            torch.minimum(torch.maximum(x.abs() - thin, y.abs() - r), torch.maximum(y.abs() - thin, x.abs() - r)),
            torch.maximum(y.abs() - thin, x.abs() - r),
            torch.maximum(x.abs() - thin, y.abs() - r),
            tilted - r,
            torch.maximum((x.abs() * 2 - y - r) / 2, y - r),
            torch.maximum(box - r, -x * y / r),
        ]
    )
    inside = (0.5 - distance[labels, torch.arange(n)]).clamp(0, 1)
    return (inside * (160 + 95 * grey[:, 0])).round().to(torch.uint8)[:, None]
