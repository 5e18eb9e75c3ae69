"""Decode any image file to a rectangle of bytes, whatever its mode, size, orientation and depth."""

from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_PIXELS = 100_000_000  # per file: an image of 48 kB can decompress to gigabytes


# not EPS, for which Pillow starts Ghostscript, nor rare formats, whose readers get little security testing
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JXL")


def open_image(source: Path | BinaryIO):
    """Open an image file of one of FORMATS and read its header.

    Raises Pillow's exceptions, ValueError above MAX_PIXELS.
    """
    from PIL import Image

    file = Image.open(source, formats=_known())
    if file.size[0] * file.size[1] > MAX_PIXELS:
        file.close()
        raise ValueError(f"{file.size[0]}x{file.size[1]} is above {MAX_PIXELS // 10**6} megapixels")
    return file


@cache
def _known() -> tuple[str, ...]:
    """Return those of FORMATS that the installed Pillow reads."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def load_rectangle(source: Path | BinaryIO, height: int, width: int, channels: int) -> tuple[Tensor, tuple[int, int]]:
    """Load an image scaled to cover height x width and cropped at the centre.

    Returns (channels, height, width) uint8, and the original's (height, width) in pixels. A JPEG is decoded at the
    smallest scale with at least twice these pixels: on fine texture the result differs from full decoding by at most 13
    grey levels, 2 on average (tests/data/test_folder.py). Raises as load_flattened does.
    """
    from PIL import Image

    image, original = load_flattened(source, channels, 2 * max(height, width))
    scale = min(image.size[0] / width, image.size[1] / height)
    part = [max(1, round(scale * length)) for length in (width, height)]
    left, top = ((full - length) // 2 for full, length in zip(image.size, part, strict=True))
    image = image.crop((left, top, left + part[0], top + part[1])).resize(
        (width, height), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    return to_tensor(image, channels), original


def adm_rectangle(source: Path | BinaryIO, height: int, width: int, channels: int) -> tuple[Tensor, tuple[int, int]]:
    """Load an image as `load_rectangle` does, with the preprocessing of ADM, DiT and their reference statistics.

    It is halved by box averages while twice height x width fits in it, scaled by bicubic interpolation, and only then
    cropped (Dhariwal & Nichol 2021, center_crop_arr of their code).
    """
    from PIL import Image

    image, original = load_flattened(source, channels)
    while image.size[0] >= 2 * width and image.size[1] >= 2 * height:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = max(width / image.size[0], height / image.size[1])
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = ((full - length) // 2 for full, length in zip(image.size, (width, height), strict=True))
    return to_tensor(image.crop((left, top, left + width, top + height)), channels), original


def centre_corner(originals: Tensor, height: int, width: int) -> Tensor:
    """Return top and left (B, 2) of the central height x width in images scaled to cover it.

    originals: heights and widths (B, 2) int64 before they were scaled.  In pixels after it, to the nearest.
    """
    size = torch.tensor([height, width])
    scaled = (originals * (size / originals).amax(1, keepdim=True)).round().long()
    return (scaled - size) // 2


CROPS = {"centre": load_rectangle, "adm": adm_rectangle}


def load_flattened(source: Path | BinaryIO, channels: int, enough: int | None = None):
    """Load an image file as a Pillow image of 3 channels or 1; return it and the original's (height, width) in pixels.

    It is rotated as EXIF says, composited on white where transparent, and 16 bits are scaled to 8.
    enough: shorter side, in pixels, above which a reduced JPEG may be decoded.
    Raises Pillow's exceptions, and ValueError for values that it would convert wrongly.
    """
    with open_image(source) as file:
        width, height = file.size
        if enough:  # JPEG: decode at half, a quarter or an eighth of the scale where that is enough
            file.draft(None, (enough, enough))
        image = composite_alpha(decode_upright(file))
    if (image.size[0] < image.size[1]) != (width < height):  # EXIF: turned by a quarter
        width, height = height, width
    return image.convert("RGB" if channels == 3 else "L"), (height, width)


def decode_upright(file):
    """Decode an opened Pillow image, rotated as EXIF says, 16 bits scaled to 8.

    Raises Pillow's exceptions and to_8bit's.
    """
    from PIL import ImageOps

    return to_8bit(ImageOps.exif_transpose(file))


def composite_alpha(image, ground: str = "white"):
    """Composite a Pillow image on a uniform ground, as RGBA, if it may be transparent; return any other unchanged."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image)


def to_tensor(image, channels: int) -> Tensor:
    """Convert a Pillow image to (channels, H, W) uint8."""
    import numpy as np

    return torch.from_numpy(np.array(image)).reshape(image.size[1], image.size[0], channels).permute(2, 0, 1)


def to_8bit(image):
    """Convert a Pillow image of 16-bit grey to 8 bits; return any other unchanged.

    Raises ValueError for floats and 32 bits.
    """
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("floating-point or 32-bit values, whose white level is unknown; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
