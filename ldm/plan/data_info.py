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
    captions: int | None = None  # different ones; None if none is read, or the data set does not list them


def card_of(cfg: Any, published: Mapping[str, Any] | None) -> DataInfo:
    """Return the metadata in `published` (of a preset), or of the config's data set if that is None.

    The preset's `shape` is that of samples other than images, whose size is the config's.
    """
    if published is not None:
        classes = [str(i) for i in range(published["classes"])]
        shape = published.get("shape") or (
            published["channels"],
            *parse_size(cfg.data.get("size") or published["size"]),
        )
        return DataInfo(
            published["data"],
            classes,
            tuple(shape),
            published["images"],
            1 + bool(cfg.data.flip),
            published["images"],  # one each
        )
    from ldm.config import build
    from ldm.config.tree import iter_nodes
    from ldm.data.captions import known_captions

    data = build.build_dataset(cfg, "train")
    is_read = any("encoder" in node for _, node in iter_nodes(build.to_container(cfg.conditioner)))
    captions = known_captions(data) if is_read else None
    return DataInfo(
        data.name,
        data.classes,
        tuple(data.shape),
        len(data),
        1 + bool(data.flip),
        None if captions is None else len(captions),
    )
