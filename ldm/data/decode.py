"""Any image file as a square of bytes, whatever its mode, size, orientation and depth."""

from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_PIXELS = 100_000_000  # of one file; a picture of 48 kB can unpack to gigabytes


# never EPS, for which Pillow starts Ghostscript, nor the rare formats whose readers nobody attacks in earnest
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "HEIF", "JXL")


def open_image(source: Path | BinaryIO):
    """An image file of one of FORMATS, its header read. Raises what Pillow raises, ValueError above MAX_PIXELS."""
    from PIL import Image

    file = Image.open(source, formats=_known())
    if file.size[0] * file.size[1] > MAX_PIXELS:
        file.close()
        raise ValueError(f"{file.size[0]}x{file.size[1]} is above {MAX_PIXELS // 10**6} megapixels")
    return file


@cache
def _known() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads."""
    from PIL import Image

    Image.init()
    return tuple(one for one in FORMATS if one in Image.OPEN)


def load_square(source: Path | BinaryIO, size: int, channels: int) -> tuple[Tensor, int]:
    """As rectangle, of size x size pixels."""
    return load_rectangle(source, size, size, channels)


def load_rectangle(source: Path | BinaryIO, height: int, width: int, channels: int) -> tuple[Tensor, int]:
    """An image file as (channels, height, width) uint8, scaled to cover that and its middle cut out, and its shorter side in pixels.

    A JPEG is decoded at the least scale that leaves twice these pixels or more: on fine texture another picture than one decoded whole by
    13 grey levels at most, 2 on average (tests/data/test_folder.py).  Raises as flat does.
    """
    from PIL import Image

    image, shorter = load_flattened(source, channels, 2 * max(height, width))
    scale = min(image.size[0] / width, image.size[1] / height)
    part = [max(1, round(scale * length)) for length in (width, height)]
    left, top = ((whole - length) // 2 for whole, length in zip(image.size, part, strict=True))
    image = image.crop((left, top, left + part[0], top + part[1])).resize(
        (width, height), Image.Resampling.LANCZOS, reducing_gap=3.0
    )
    return to_tensor(image, channels), shorter


def adm_square(source: Path | BinaryIO, size: int, channels: int) -> tuple[Tensor, int]:
    """As square, by the pixels of ADM, DiT and their reference statistics: halved by box averages while twice the size fits in, scaled by
    bicubic interpolation, and only then cut (Dhariwal & Nichol 2021, center_crop_arr of their code)."""
    from PIL import Image

    image, shorter = load_flattened(source, channels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.size[0] * scale), round(image.size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = ((length - size) // 2 for length in image.size)
    return to_tensor(image.crop((left, top, left + size, top + size)), channels), shorter


CROPS = {"centre": load_square, "adm": adm_square}


def load_flattened(source: Path | BinaryIO, channels: int, enough: int | None = None):
    """An image file as a Pillow image of 3 channels or of 1, and its shorter side in pixels; enough: a side that is as good as the whole.

    Turned as its EXIF says, laid on white where transparent, 16 bits scaled to 8.  Raises what Pillow raises, and ValueError for what it
    would get wrong.
    """
    with open_image(source) as file:
        shorter = min(file.size)
        if enough:  # JPEG: decode at half, a quarter or an eighth of the scale where that is enough
            file.draft(None, (enough, enough))
        image = composite_alpha(decode_upright(file))
    return image.convert("RGB" if channels == 3 else "L"), shorter


def decode_upright(file):
    """Decode an opened Pillow image, turned as its EXIF says, 16 bits scaled to 8. Raises what Pillow raises, and as to_8bit does."""
    from PIL import ImageOps

    return to_8bit(ImageOps.exif_transpose(file))


def composite_alpha(image, ground: str = "white"):
    """Lay a Pillow image on a ground of one colour, as RGBA, if any of it may be transparent; return any other as it is."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), image)


def to_tensor(image, channels: int) -> Tensor:
    """A Pillow image as (channels, H, W) uint8."""
    import numpy as np

    return torch.from_numpy(np.array(image)).reshape(image.size[1], image.size[0], channels).permute(2, 0, 1)


def to_8bit(image):
    """A Pillow image of 16-bit grey as 8-bit grey, any other as it is. Raises ValueError for floats and wider numbers."""
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("floating-point or 32-bit values, whose white is anyone's guess; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
