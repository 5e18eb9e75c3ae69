"""Metadata of the data set that a model was trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.io import atomic

MAX_SIDE = 1 << 16  # pixels, or samples, per side


@dataclass(frozen=True)
class DataCard:
    """Metadata of the data set that a model was trained on, stored in the run folder as data.json.

    shape: of a sample, (C, L), (C, H, W) or (C, F, H, W).  classes: their names, none for data without labels.
    captions: of each class, or in one list without classes; none for data without captions.
    """

    fingerprint: str
    shape: Sequence[int]
    classes: Sequence[str] = ()
    captions: Sequence[Sequence[str]] = ()

    @staticmethod
    def from_dataset(data) -> "DataCard":
        return DataCard(data.fingerprint, tuple(data.shape), data.classes, data.captions)

    @staticmethod
    def from_dict(values: Any) -> "DataCard":
        """Build a card from plain data.  Raises ValueError if it is not a valid card."""
        names = {"fingerprint", "shape", "classes", "captions"}
        if not isinstance(values, dict) or values.keys() != names:
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
        return DataCard(values["fingerprint"], tuple(shape), classes, captions)

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / "data.json", asdict(self))
