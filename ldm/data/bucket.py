"""Images of many shapes: each scaled to the nearest of a few shapes of one area, and batches of one shape each."""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.decode import opened, rectangle
from ldm.data.lazy import Lazy
from ldm.data.memory import flipped
from ldm.data.stream import Slice
from ldm.tensors import key


def shapes(side: int, multiple: int = 64, widest: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) of buckets, tallest first: multiples of `multiple`, of at most side^2 pixels, no more than `widest` to 1.

    SDXL, Podell et al. 2023, sec. 2.3.  Raises ValueError where not even the square fits.
    """
    if side < multiple:
        raise ValueError(f"side={side}: expected {multiple} or more, one multiple")
    found = {
        (height, width)
        for height in range(multiple, int(side * math.sqrt(widest)) + 1, multiple)
        for width in [side * side // height // multiple * multiple]
        if width and max(height / width, width / height) <= widest
    }
    found |= {(width, height) for height, width in found}
    return sorted(found, key=lambda shape: (shape[1] / shape[0], shape))


def nearest(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> int:
    """The place of the shape whose ratio is nearest to that of (height, width), by its logarithm; of equals, the one of most pixels."""
    ratio = math.log(size[1] / size[0])
    return min(range(len(shapes)), key=lambda i: (abs(math.log(shapes[i][1] / shapes[i][0]) - ratio), -math.prod(shapes[i])))


@dataclass(frozen=True)
class BucketStream:
    """As Stream, but the rows of each batch are of one bucket: a pure function of the step.

    buckets: of each sample.  Every bucket is an endless stream of its own passes, of which step after step takes `batch` rows; in the long
    run each comes in proportion to its size, in an order drawn anew for each pass over the data.
    """

    buckets: tuple[int, ...]
    batch: int
    steps: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if not self.buckets:
            raise ValueError("the data set is empty")
        if not (self.batch >= self.world >= 1 and 0 <= self.rank < self.world):
            raise ValueError(f"batch={self.batch} rows cannot be shared out to rank {self.rank} of {self.world}: at least one row a rank")
        if not 0 <= self.start <= self.steps:
            raise ValueError(f"start={self.start}: expected a step from 0 to steps={self.steps}")

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[Slice]:
        return map(self.at, range(self.start, self.steps))

    def at(self, step: int) -> Slice:
        """This rank's slice of the batch of any step >= 0."""
        members = _members(self.buckets)
        sizes = [len(one) for one in members]
        passes = range(self.batch * (step + 1 + len(sizes)) // len(self.buckets) + 2)  # each bucket is less than a batch behind its share
        place = bisect_right(passes, step, key=lambda e: _before(sizes, self.batch, e)) - 1
        bucket, turn = _plan(tuple(sizes), self.batch, self.seed, place)[step - _before(sizes, self.batch, place)]
        low, high = (self.batch * r // self.world for r in (self.rank, self.rank + 1))
        where = (divmod(turn * self.batch + i, sizes[bucket]) for i in range(low, high))
        at = [(e, members[bucket][_order(self.seed, bucket, e, sizes[bucket])[i]]) for e, i in where]
        return Slice(at, list(range(low, high)), self.batch, step)


def _before(sizes: Sequence[int], batch: int, place: int) -> int:
    """The steps of all passes before pass `place`: of each bucket as many batches as its rows by then fill."""
    return sum(place * size // batch for size in sizes)


@lru_cache(maxsize=4)
def _members(buckets: tuple[int, ...]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for i, bucket in enumerate(buckets):
        found.setdefault(bucket, []).append(i)
    return [found[bucket] for bucket in sorted(found)]


@lru_cache(maxsize=4)
def _plan(sizes: tuple[int, ...], batch: int, seed: int, place: int) -> list[tuple[int, int]]:
    """(bucket, how many batches it had before) for each step of a pass."""
    turns = [(b, k) for b, size in enumerate(sizes) for k in range(place * size // batch, (place + 1) * size // batch)]
    order = torch.randperm(len(turns), generator=torch.Generator().manual_seed(key(seed, "buckets", place))).tolist()
    return [turns[i] for i in order]


@lru_cache(maxsize=64)
def _order(seed: int, bucket: int, place: int, length: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(key(seed, "order", bucket, place))).tolist()


class Bucketed(Dataset):
    """A Lazy data set whose images keep their shape as far as `shapes` allows: image (B, channels, height, width), one shape a batch.

    sizes: (height, width) of each image's file.  `stream` gives batches that can be stacked.
    """

    def __init__(self, dataset: Lazy, sizes: Sequence[tuple[int, int]], shapes: Sequence[tuple[int, int]]):
        if len(sizes) != len(dataset):
            raise ValueError(f"{len(sizes)} sizes do not fit a data set of {len(dataset)} images")
        self.dataset, self.shapes = dataset, list(shapes)
        self.buckets = tuple(nearest(size, shapes) for size in sizes)

    def __len__(self) -> int:
        return len(self.dataset)

    def stream(self, batch: int, steps: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> BucketStream:
        """The batches of a training."""
        return BucketStream(self.buckets, batch, steps, seed, start, rank, world)

    def batch(self, at: Sequence[tuple[int, int]]) -> dict:
        """The samples at (place, index) pairs, all of one bucket. Raises ValueError for others."""
        found = {self.buckets[i] for _, i in at}
        if len(found) != 1:
            raise ValueError(f"a batch of {len(found)} buckets cannot be stacked; take batches from `stream`")
        batch = self.dataset.about(at)
        return {"image": flipped(self.pixels(batch["index"]), batch["flip"]), **batch}

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Images (B, channels, height, width) float32 in [-1, 1] of one bucket, never flipped."""
        source, rows = self.dataset.source, self.dataset.rows
        images = [rectangle(source.image(int(rows[i])), *self.shapes[self.buckets[i]], self.dataset.channels)[0] for i in index]
        return torch.stack(images).float().div_(127.5).sub_(1)


def sizes_of(dataset: Lazy) -> list[tuple[int, int]]:
    """(height, width) of every image's file, by its header, turned as its EXIF says."""
    found = []
    for row in dataset.rows.tolist():
        with opened(dataset.source.image(row)) as file:
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            found.append(file.size if turned else file.size[::-1])
    return found
