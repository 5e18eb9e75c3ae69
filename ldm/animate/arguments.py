"""Resolve arguments of the animations: an option of conf/, an image file, a trained run and its conditions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.cli.args import choose
from ldm.data.decode import open_image, to_tensor
from ldm.errors import UserError

if TYPE_CHECKING:
    from ldm.model import LatentDiffusion


def load_option(group: str, name: str, text: str | None = None) -> Any:
    """Build conf/<group>/<name>.yaml: an object, or a function with its options bound.

    text: the argument that names it, if that is not called as the group.  Raises UserError with the closest name.
    """
    from hydra.utils import instantiate

    from ldm.config.compose import ROOT, compose_option
    from ldm.config.overrides import ConfigSearchPath

    options = ConfigSearchPath((ROOT / "conf",), ROOT).groups()[group]
    return instantiate(compose_option(group, choose(group, text or group, name, options)))


def load_image(path: str, size: int, crop: Sequence[float] | None = None) -> Tensor:
    """Load the central square of an image file as (C, size, size) in [-1, 1].

    crop: left, top, width, height in pixels of the part to take it from.  Raises UserError.
    """
    from PIL import Image, ImageOps

    try:
        with open_image(Path(path).expanduser()) as file:
            image = file.convert("L" if file.mode in ("1", "L", "I", "F", "I;16") else "RGB")
            if crop is not None:
                image = image.crop(_box(crop, image.size))
            square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        raise UserError(f"image={path}: no such file") from None
    except UserError:
        raise
    except Exception as error:  # Pillow's plugins raise any type
        raise UserError(
            f"image={path}: {' '.join(str(error).split()) or 'unreadable'}; expected an image file"
        ) from None
    return to_tensor(square, len(square.getbands())).float() / 127.5 - 1


def _box(crop: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, width, height = (int(one) for one in crop) if len(crop) == 4 else (0, 0, 0, 0)
    if not (0 <= left < left + width <= size[0] and 0 <= top < top + height <= size[1]):
        raise UserError(
            f"crop={','.join(f'{one:g}' for one in crop)}: "
            f"expected left,top,width,height within {size[0]} x {size[1]} pixels"
        )
    return left, top, left + width, top + height


def require_at_least(least: int, /, **values: float) -> None:
    """Check that all values are at least `least`.  Raises UserError naming the first that is not."""
    for key, value in values.items():
        if value < least:
            raise UserError(f"{key}={value}: expected {least} or more")


def model_of(run: str) -> "LatentDiffusion":
    """Load the trained model of a run.  Raises UserError."""
    from ldm.checkpoint.load import open_model

    return open_model(run).load()


def prompt_batch(run: str, prompt: str | None, num: int) -> dict[str, Any]:
    """Return a batch of `num` conditions: the prompt or, without one, captions and classes of the data in turn."""
    from ldm.checkpoint.load import open_model
    from ldm.sampling.prompts import captions_and_labels

    pairs = captions_and_labels(open_model(run).data_card, num, prompt)
    batch: dict[str, Any] = {"index": list(range(num)), "caption": [caption for caption, _ in pairs]}
    labels = [label for _, label in pairs]
    return batch if None in labels else batch | {"label": torch.tensor(labels)}
