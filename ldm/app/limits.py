"""Limits on requests to the web page, checked before anything is computed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import UserError

RAISE_LIMIT_HINT = "raise it with {} when the page is started"


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    num: images.  steps: of the sampler.  side: of a generated image, pixels.  megapixels: of an uploaded file.
    waiting: requests in the queue.  words: characters of a prompt.
    """

    num: int = 64
    steps: int = 500
    side: int = 1024
    megapixels: float = 16.0
    waiting: int = 8
    words: int = 2000

    def check(self, values: Mapping[str, Any], size: tuple[int, int] | None) -> None:
        """Check a request for images of size (height, width), None for other samples.

        Raises UserError naming the first value that is invalid or above its limit.
        """
        for name, most, option in (("num", self.num, "most_num"), ("steps", self.steps, "most_steps")):
            value = parse_int(name, values[name])
            if not 1 <= value <= most:
                raise UserError(f"{name}={value}: expected 1 to {most}; {RAISE_LIMIT_HINT.format(f'{option}=')}")
        if not 0 <= parse_int("seed", values["seed"]) < 2**31:
            raise UserError(f"seed={values['seed']}: expected 0 to {2**31 - 1}")
        if size is not None and (max(size) > self.side or min(size) < 1):
            raise UserError(
                f"images of {size[1]} x {size[0]} pixels: expected a side of 1 to {self.side}; "
                f"{RAISE_LIMIT_HINT.format('most_side=')}"
            )
        for name in ("prompt", "negative"):
            if len(values.get(name) or "") > self.words:
                raise UserError(f"{name} of {len(values[name])} characters: expected {self.words} at most")

    def image_size(self, name: str, path: Path) -> tuple[int, int]:
        """Read (height, width) of an uploaded file.  Raises UserError if it is not an image, or too large."""
        from PIL import Image

        try:
            with Image.open(path) as image:
                width, height = image.size
        except Exception as error:  # Pillow's plugins raise any type
            raise UserError(
                f"{name} cannot be read as an image ({' '.join(str(error).replace(str(path), name).split())})"
            ) from None
        self.check_area(name, width, height)
        return height, width

    def check_area(self, name: str, width: int, height: int) -> None:
        """Raise UserError for an image with too many pixels."""
        if width * height > self.megapixels * 1e6:
            many = f"{name} of {width} x {height} pixels, {width * height / 1e6:.1f} megapixels"
            raise UserError(
                f"{many}: expected {self.megapixels:g} at most; {RAISE_LIMIT_HINT.format('most_megapixels=')}"
            )


def parse_int(name: str, value: Any) -> int:
    """Convert a number from a form to int.  Raises UserError for an empty field and for a number with a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or int(value) != value:
        raise UserError(f"{name}{'' if value is None else f'={value}'}: expected a whole number")
    return int(value)
