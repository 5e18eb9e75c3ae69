"""Images (C, H, W): PNG files and grids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.io.images import image_fault, make_grid, to_uint8
from ldm.media.files import write_sample

IS_PICTURE = True
ZOOM = 2  # copies of each pixel per direction in a sheet


def write(stem: Path, sample: Tensor, metadata: Mapping[str, str]) -> list[Path]:
    """Write an image (C, H, W) in [-1, 1], C = 1, 3 or 4, as STEM.png with the metadata in it."""
    return write_sample(stem, {}, sample, metadata)


def sheet(samples: Sequence[Tensor], columns: int) -> Tensor:
    """Arrange images (C, H, W) in [-1, 1] row by row; return (C, H', W') in [-1, 1], enlarged by ZOOM."""
    images = torch.stack([to_uint8(sample).cpu() for sample in samples])
    return make_grid(images, columns, zoom=ZOOM).float() / 127.5 - 1


def fault(shape: Sequence[int]) -> str:
    """Return why samples of a shape are no images, "" if they are."""
    return image_fault(shape)
