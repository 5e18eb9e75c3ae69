"""Metadata of the data set that a model was trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.io import atomic

MAX_IMAGE_SIZE = 1 << 16  # pixels per side


@dataclass(frozen=True)
class DataCard:
    """Metadata of the data set that a model was trained on, stored in the run folder as data.json."""

    fingerprint: str
    classes: Sequence[str]
    captions: Sequence[Sequence[str]]
    channels: int
    size: int

    @staticmethod
    def from_dataset(data) -> "DataCard":
        return DataCard(data.fingerprint, data.classes, data.captions, data.channels, data.size)

    @staticmethod
    def from_dict(values: Any) -> "DataCard":
        """Build a card from plain data.  Raises ValueError if it is not a valid card."""
        names = {"fingerprint", "classes", "captions", "channels", "size"}
        if not isinstance(values, dict) or values.keys() != names:
            raise ValueError(f"expected {', '.join(sorted(names))}")
        classes, captions = values["classes"], values["captions"]
        valid_captions = isinstance(captions, list) and all(
            isinstance(one, list) and one and all(isinstance(text, str) for text in one) for one in captions
        )
        if (
            not isinstance(values["fingerprint"], str)
            or not isinstance(classes, list)
            or not all(isinstance(one, str) for one in classes)
        ):
            raise ValueError("expected a fingerprint and class names")
        if not valid_captions or not classes or len(captions) != len(classes):
            raise ValueError("expected captions for each class")
        if (
            values["channels"] not in (1, 3)
            or type(values["size"]) is not int
            or not 1 <= values["size"] <= MAX_IMAGE_SIZE
        ):
            raise ValueError(f"expected 1 or 3 channels and a size of 1 to {MAX_IMAGE_SIZE} pixels")
        return DataCard(**values)

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / "data.json", asdict(self))
