"""What a request asks of the shape of samples, and the sizes that it conditions them on."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import UserError
from ldm.io.images import COLOUR_CHANNELS, PICTURE_CHANNELS, image_fault


def check_shape(cfg: Any, shape: Sequence[int]) -> None:
    """Raise UserError for what can be done with images alone, if samples of the model have another shape."""
    options = (
        ("metrics=...", COLOUR_CHANNELS, "_target_" in cfg.metrics),
        ("save=npz", COLOUR_CHANNELS, cfg.save == "npz" and not image_fault(shape)),
        (f"hints={cfg.hints}", PICTURE_CHANNELS, cfg.hints is not None),
        (f"tile={cfg.tile}", shape[:1], cfg.tile is not None),
        *((f"{name}={cfg[name]}", PICTURE_CHANNELS, cfg[name] is not None) for name in cfg.inputs),
        (f"task={str(cfg.task['_target_']).rpartition('.')[2]}", shape[:1], bool(cfg.inputs)),
    )
    for option, channels, is_set in options:
        if is_set and (fault := image_fault(shape, channels)):
            raise UserError(f"{option} is for images: {fault}; leave it out")


def given_sizes(options: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Return those of original_size and crop that are not null. Raises UserError unless they are two pixel numbers."""
    sizes = {name: options[name] for name in ("original_size", "crop") if options[name] is not None}
    for name, size in sizes.items():
        least = 0 if name == "crop" else 1
        if not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and x >= least for x in size):
            form = "[top,left]" if name == "crop" else "[height,width]"
            raise UserError(f"{name}={size}: expected {form} in pixels, {least} or more")
    return sizes
