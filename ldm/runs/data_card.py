"""Metadata of the data set that a model was trained on."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.config import trust
from ldm.io import atomic
from ldm.media import medium as media

MAX_SIDE = 1 << 16  # pixels, or samples, per side
MAX_RATE = 1000  # frames per second


@dataclass(frozen=True)
class DataCard:
    """Metadata of the data set that a model was trained on, stored in the run folder as data.json.

    shape: of a sample, (C, L), (C, H, W) or (C, F, H, W).  classes: their names, none for data without labels.
    captions: of each class, or in one list without classes; none for data without captions.
    medium: what a sample is to a person, see ldm/media/medium.py.  rate: frames per second of a clip, None if the data
    set names none.
    """

    fingerprint: str
    shape: Sequence[int]
    classes: Sequence[str] = ()
    captions: Sequence[Sequence[str]] = ()
    medium: str = media.DEFAULT
    rate: float | None = None

    @staticmethod
    def from_dataset(data) -> "DataCard":
        medium, rate = getattr(data, "medium", media.DEFAULT), getattr(data, "rate", None)
        return DataCard(data.fingerprint, tuple(data.shape), data.classes, data.captions, medium, rate)

    @staticmethod
    def from_dict(values: Any) -> "DataCard":
        """Build a card from plain data; `medium` and `rate` may be missing.

        Raises ValueError if it is not a valid card, or UserError if it names a module that is neither a medium of ldm
        nor the user's own.
        """
        names = {"fingerprint", "shape", "classes", "captions"}
        values = {"medium": media.DEFAULT, "rate": None, **values} if isinstance(values, dict) else {}
        if values.keys() != names | {"medium", "rate"}:
            raise ValueError(f"expected {', '.join(sorted(names))}")
        shape, classes, captions = values["shape"], values["classes"], values["captions"]
        valid_captions = isinstance(captions, list) and all(
            isinstance(one, list) and one and all(isinstance(text, str) for text in one) for one in captions
        )
        if (
            not isinstance(values["fingerprint"], str)
            or not isinstance(classes, list)
            or not all(isinstance(one, str) for one in classes)
        ):
            raise ValueError("expected a fingerprint and class names")
        if not valid_captions or len(captions) not in (0, len(classes) or 1):
            raise ValueError("expected captions for each class, or none")
        if (
            not isinstance(shape, list)
            or not 2 <= len(shape) <= 4
            or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in shape)
        ):
            raise ValueError(f"expected a shape (C, L), (C, H, W) or (C, F, H, W) of sides from 1 to {MAX_SIDE}")
        medium, rate = values["medium"], values["rate"]
        if not isinstance(medium, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", medium):
            raise ValueError("expected the name of a medium")
        if rate is not None and not (type(rate) in (int, float) and 0 < rate <= MAX_RATE):
            raise ValueError(f"expected a rate above 0, to {MAX_RATE}")
        trust.check_medium(medium)
        return DataCard(values["fingerprint"], tuple(shape), classes, captions, medium, rate)

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / "data.json", asdict(self))
