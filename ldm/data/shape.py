"""Shapes of samples: channels first, then (L,), (height, width) or (frames, height, width)."""

from collections.abc import Sequence

from ldm.errors import ConfigError


def parse_size(size: int | Sequence[int], least: int = 1) -> tuple[int, int]:
    """Return (height, width) of a size in pixels: one number for a square, or [height, width].

    Raises ConfigError for anything else, and for a side below `least`.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(type(side) is int and side >= least for side in sides):
        raise ConfigError(f"size={size}: expected {least} px or more, one number for squares or [height,width]")
    return sides


def format_size(sides: Sequence[int]) -> int | list[int]:
    """Return sides as a config has them: one number if they are equal, else a list."""
    return sides[0] if len(set(sides)) == 1 else list(sides)
