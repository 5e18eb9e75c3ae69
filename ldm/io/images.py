"""Write images to PNG files, single or as a grid, with the request that reproduces them as metadata."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io import atomic

PICTURE_CHANNELS = (1, 3, 4)  # grey, RGB and RGBA: what a PNG file can hold
COLOUR_CHANNELS = (1, 3)  # grey and RGB: what feature networks, and changes of colour, take


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


def to_uint8(image: Tensor) -> Tensor:
    """Quantise an image in [-1, 1] to uint8 (B, C, H, W): clamped, then rounded to the nearest of 256 levels.

    All metrics use this quantisation; torchmetrics' own (`normalize=True`) truncates.
    Raises ValueError for integers and NaN.
    """
    if not image.is_floating_point():
        raise ValueError(
            f"image is {image.dtype}: expected floating point in [-1, 1]; convert a uint8 image u to u / 127.5 - 1"
        )
    image = image.float()
    if image.isnan().any():
        raise UserError("image holds NaN: expected values in [-1, 1]; the model that generated it has diverged")
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_float(image: Tensor) -> Tensor:
    """Return an image as float32 in [-1, 1]: uint8 is converted, the inverse of `to_uint8`; floats stay as they are."""
    return image.float() / 127.5 - 1 if image.dtype == torch.uint8 else image.float()


def image_fault(shape: Sequence[int], channels: Sequence[int] = PICTURE_CHANNELS) -> str:
    """Return why samples of a shape are no images (C, H, W) with one of these numbers of channels; "" if they are."""
    if len(shape) == 3 and shape[0] in channels:
        return ""
    return f"samples of shape {tuple(shape)} are no images of {' or '.join(map(str, channels))} channels"


def colour(values: Tensor, colours: Tensor) -> Tensor:
    """Colour values (H, W) in [-1, 1] by linear interpolation in colours (N, 3) in [0, 1]: (3, H, W)."""
    position = (values.clamp(-1, 1) + 1) / 2 * (len(colours) - 1)
    low = position.floor().long().clamp_max(len(colours) - 2)
    return torch.lerp(colours[low], colours[low + 1], (position - low)[..., None]).permute(2, 0, 1)
