"""Write images to PNG files, single or as a grid, with the request that reproduces them as metadata."""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ldm.io import atomic


def encode_png(image: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """Encode image (C, H, W) uint8, C = 1, 3 or 4, as PNG with `text` as its metadata."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value, zip=len(value) > 500)
    pixels = image.permute(1, 2, 0).contiguous().cpu().numpy()  # (H, W, C)
    buffer = BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def make_grid(images: Tensor, columns: int, gap: int = 2, zoom: int = 1) -> Tensor:
    """Arrange images (N, C, H, W) uint8 row by row and return (C, H', W').

    gap: white pixels between images.  zoom: copies of each pixel per direction.
    """
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.full((c, rows * (h + gap) + gap, columns * (w + gap) + gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (h + gap), gap + (i % columns) * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    return sheet


def save_png(path: Path, image: Tensor, text: Mapping[str, str] | None = None) -> None:
    """Write image (C, H, W) uint8 to `path` atomically; text: metadata."""
    atomic.write_bytes(path, encode_png(image, text))
