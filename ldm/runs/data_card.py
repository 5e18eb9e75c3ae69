"""What a model needs to know of the data it was trained on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.io import atomic

MAX_IMAGE_SIZE = 1 << 16  # pixels on a side of anybody's images


@dataclass(frozen=True)
class DataCard:
    """What a model must know of the data it was trained on, kept in the run folder as data.json."""

    fingerprint: str
    classes: Sequence[str]
    captions: Sequence[Sequence[str]]
    channels: int
    size: int

    @staticmethod
    def from_dataset(data) -> "DataCard":
        return DataCard(data.fingerprint, data.classes, data.captions, data.channels, data.size)

    @staticmethod
    def from_dict(said: Any) -> "DataCard":
        """The card that plain data describe. Raises ValueError for what is none."""
        names = {"fingerprint", "classes", "captions", "channels", "size"}
        if not isinstance(said, dict) or said.keys() != names:
            raise ValueError(f"expected {', '.join(sorted(names))}")
        classes, captions = said["classes"], said["captions"]
        told = isinstance(captions, list) and all(
            isinstance(one, list) and one and all(isinstance(x, str) for x in one) for one in captions
        )
        if (
            not isinstance(said["fingerprint"], str)
            or not isinstance(classes, list)
            or not all(isinstance(one, str) for one in classes)
        ):
            raise ValueError("expected a fingerprint and the names of classes")
        if not told or not classes or len(captions) != len(classes):
            raise ValueError("expected captions of each class")
        if said["channels"] not in (1, 3) or type(said["size"]) is not int or not 1 <= said["size"] <= MAX_IMAGE_SIZE:
            raise ValueError(f"expected 1 or 3 channels and a size of 1 to {MAX_IMAGE_SIZE} pixels")
        return DataCard(**said)

    def write(self, folder: Path) -> None:
        atomic.write_json(folder / "data.json", asdict(self))
