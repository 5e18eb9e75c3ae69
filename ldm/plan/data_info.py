"""What the planner needs to know of a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class DataInfo:
    """What a plan must know of the data: the config's own where it is there, else what a preset says of its paper's."""

    name: str
    classes: Sequence[str]
    channels: int
    size: int
    images: int
    flips: int


def card_of(cfg: Any, published: Mapping[str, Any] | None) -> DataInfo:
    if published is not None:
        classes = [str(i) for i in range(published["classes"])]
        size = cfg.data.get("size") or published["size"]
        return DataInfo(
            published["data"], classes, published["channels"], size, published["images"], 1 + bool(cfg.data.flip)
        )
    from ldm.config import build

    data = build.build_dataset(cfg, "train")
    return DataInfo(data.name, data.classes, data.channels, data.size, len(data), 1 + bool(data.flip))
