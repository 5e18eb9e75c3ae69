"""Metadata of a data set for planning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.data.shape import parse_size


@dataclass(frozen=True)
class DataInfo:
    """Metadata of a data set: the config's own if it exists, else what a preset specifies for its paper's."""

    name: str
    classes: Sequence[str]
    shape: Sequence[int]
    images: int
    flips: int


def card_of(cfg: Any, published: Mapping[str, Any] | None) -> DataInfo:
    """Return the metadata in `published` (of a preset), or of the config's data set if that is None."""
    if published is not None:
        classes = [str(i) for i in range(published["classes"])]
        shape = (published["channels"], *parse_size(cfg.data.get("size") or published["size"]))
        return DataInfo(published["data"], classes, shape, published["images"], 1 + bool(cfg.data.flip))
    from ldm.config import build

    data = build.build_dataset(cfg, "train")
    return DataInfo(data.name, data.classes, tuple(data.shape), len(data), 1 + bool(data.flip))
