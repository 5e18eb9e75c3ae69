"""Heights recovered from a map drawn in the colours of ETOPO1, and their representation as bytes."""

from functools import cache
from itertools import pairwise

import numpy as np

RAMP = (  # metres, red, green, blue: the ETOPO1 colour table of the Generic Mapping Tools
    *(
        (-11000, 10, 0, 121),
        (-10500, 26, 0, 137),
        (-10000, 38, 0, 152),
        (-9500, 27, 3, 166),
        (-9000, 16, 6, 180),
        (-8500, 5, 9, 193),
    ),
    *(
        (-8000, 0, 14, 203),
        (-7500, 0, 22, 210),
        (-7000, 0, 30, 216),
        (-6500, 0, 39, 223),
        (-6000, 12, 68, 231),
        (-5500, 26, 102, 240),
    ),
    *(
        (-5000, 19, 117, 244),
        (-4500, 14, 133, 249),
        (-4000, 21, 158, 252),
        (-3500, 30, 178, 255),
        (-3000, 43, 186, 255),
    ),
    *(
        (-2500, 55, 193, 255),
        (-2000, 65, 200, 255),
        (-1500, 79, 210, 255),
        (-1000, 94, 223, 255),
        (-500, 138, 227, 255),
    ),
    *(
        (-1, 188, 230, 255),
        (0, 51, 102, 0),
        (100, 51, 204, 102),
        (200, 187, 228, 146),
        (500, 255, 220, 185),
        (1000, 243, 202, 137),
    ),
    *((1500, 230, 184, 88), (2000, 217, 166, 39), (2500, 168, 154, 31), (3000, 164, 144, 25), (3500, 162, 134, 19)),
    *((4000, 159, 123, 13), (4500, 156, 113, 7), (5000, 153, 102, 0), (5500, 162, 89, 89), (6000, 178, 118, 118)),
    *(
        (6500, 183, 147, 147),
        (7000, 194, 176, 176),
        (7500, 204, 204, 204),
        (8000, 229, 229, 229),
        (8500, 242, 242, 242),
    ),
)
DEEPEST, HIGHEST = 11000, 8500  # metres below and above sea level
BITS = 5  # bits of each colour channel that are used


def heights(image: np.ndarray) -> np.ndarray:
    """Convert a shaded map (H, W, 3) uint8 in the ramp's colours to metres, int16 (H, W), by hue, then brightness."""
    red, green, blue = (image[..., i].astype(np.uint16) >> (8 - BITS) for i in range(3))
    return _table()[(red << 2 * BITS) | (green << BITS) | blue]


@cache
def _table() -> np.ndarray:
    """Return the height for each colour of BITS bits per channel."""
    ramp = np.array(RAMP, np.float32)
    parts = [np.linspace(a, b, 8, endpoint=False) for a, b in pairwise(ramp) if (a[0] < 0) == (b[0] < 0)]
    ramp = np.concatenate([*parts, ramp[-1:]])
    level = (np.arange(2**BITS) + 0.5) * 2 ** (8 - BITS)
    colours = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    a, b = _features(colours), _features(ramp[:, 1:])
    distance = (b**2).sum(1) - 2 * a @ b.T  # squared distance without the term that does not depend on the ramp
    return ramp[distance.argmin(1), 0].round().astype(np.int16)


def _features(colour: np.ndarray) -> np.ndarray:
    """Return the hue at full weight and the brightness at a quarter, as hill shading changes the brightness."""
    brightness = np.linalg.norm(colour, axis=1, keepdims=True)
    return np.concatenate([255 * colour / brightness.clip(1), brightness / 4], 1)


def to_bytes(metres: np.ndarray) -> np.ndarray:
    """Map heights to bytes by their square roots, which gives plains and shelves enough levels.

    0 is the deepest sea, 127 | 128 the shore, 255 the highest peak.
    """
    part = np.sqrt(np.abs(metres) / np.where(metres < 0, DEEPEST, HIGHEST))
    return np.where(metres < 0, 127 - 127 * part, 128 + 127 * part).round().clip(0, 255).astype(np.uint8)


def median_filter(image: np.ndarray, side: int = 5) -> np.ndarray:
    """Replace each pixel of an image (H, W) uint8 by the median of side x side pixels.

    It repairs shaded slopes, which do not have the ramp's colours.
    """
    from PIL import Image, ImageFilter

    return np.array(Image.fromarray(image).filter(ImageFilter.MedianFilter(side)))
