"""Any image file as a square of bytes, whatever its mode, size, orientation and depth."""

from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

MAX_PIXELS = 100_000_000  # of one file; a picture of 48 kB can unpack to gigabytes


def square(source: Path | BinaryIO, size: int, channels: int) -> tuple[Tensor, int]:
    """An image file as (channels, size, size) uint8, its shorter side scaled and its middle cut out, and that side in pixels.

    Turned as its EXIF says, laid on white where transparent, 16 bits scaled to 8. Raises what Pillow raises, and ValueError for what it
    would get wrong.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(source) as file:
        width, height = file.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} is above {MAX_PIXELS // 10**6} megapixels")
        file.draft(None, (2 * size, 2 * size))  # JPEG: decode at half, a quarter or an eighth of the scale where that is enough
        image = eight_bit(ImageOps.exif_transpose(file))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1), min(width, height)


def eight_bit(image):
    """A Pillow image of 16-bit grey as 8-bit grey, any other as it is. Raises ValueError for floats and wider numbers."""
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("floating-point or 32-bit values, whose white is anyone's guess; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
