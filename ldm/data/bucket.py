"""Images of many shapes: each scaled to the nearest of a few shapes of one area, and batches of one shape each."""

import io
import math
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.decode import open_image
from ldm.data.folder import File, ImageFolder, decode_all
from ldm.data.image_cache import cached
from ldm.data.memory import InMemoryDataset, flip_where
from ldm.data.stream import BatchSlice, BatchStream
from ldm.errors import ConfigError, UserError
from ldm.tensors import derive_seed


def bucket_shapes(side: int, multiple: int = 64, widest: float = 2.0) -> list[tuple[int, int]]:
    """(height, width) of buckets, tallest first: multiples of `multiple`, of at most side^2 pixels, no more than `widest` to 1.

    SDXL, Podell et al. 2023, sec. 2.3.  Raises ConfigError where not even the square fits.
    """
    if side < multiple:
        raise ConfigError(f"side={side}: expected {multiple} or more, one multiple")
    found = {
        (height, width)
        for height in range(multiple, int(side * math.sqrt(widest)) + 1, multiple)
        for width in [side * side // height // multiple * multiple]
        if width and max(height / width, width / height) <= widest
    }
    found |= {(width, height) for height, width in found}
    return sorted(found, key=lambda shape: (shape[1] / shape[0], shape))


def nearest_bucket(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> int:
    """The place of the shape whose ratio is nearest to that of (height, width), by its logarithm; of equals, the one of most pixels."""
    ratio = math.log(size[1] / size[0])
    return min(
        range(len(shapes)), key=lambda i: (abs(math.log(shapes[i][1] / shapes[i][0]) - ratio), -math.prod(shapes[i]))
    )


@dataclass(frozen=True)
class BucketStream(BatchStream):
    """As Stream, but the rows of each batch are of one bucket: a pure function of the step.

    buckets: of each sample.  Every bucket is an endless stream of its own passes, of which step after step takes `batch` rows; in the long
    run each comes in proportion to its size, in an order drawn anew for each pass over the data.
    """

    buckets: tuple[int, ...] = field(kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if len(self.buckets) != self.length:
            raise ValueError(f"{len(self.buckets)} buckets of {self.length} samples: expected one a sample")

    def batch_at(self, step: int) -> BatchSlice:
        """This rank's slice of the batch of any step >= 0."""
        members = _members(self.buckets)
        sizes = [len(one) for one in members]
        passes = range(
            self.batch * (step + 1 + len(sizes)) // len(self.buckets) + 2
        )  # each bucket is less than a batch behind its share
        place = bisect_right(passes, step, key=lambda e: _before(sizes, self.batch, e)) - 1
        bucket, turn = _plan(tuple(sizes), self.batch, self.seed, place)[step - _before(sizes, self.batch, place)]
        low, high = (self.batch * r // self.world for r in (self.rank, self.rank + 1))
        where = (divmod(turn * self.batch + i, sizes[bucket]) for i in range(low, high))
        at = [(e, members[bucket][_order(self.seed, bucket, e, sizes[bucket])[i]]) for e, i in where]
        return BatchSlice(at, list(range(low, high)), self.batch, step)


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
    order = torch.randperm(
        len(turns), generator=torch.Generator().manual_seed(derive_seed(seed, "buckets", place))
    ).tolist()
    return [turns[i] for i in order]


@lru_cache(maxsize=64)
def _order(seed: int, bucket: int, place: int, length: int) -> list[int]:
    return torch.randperm(
        length, generator=torch.Generator().manual_seed(derive_seed(seed, "order", bucket, place))
    ).tolist()


class BucketedFolder(ImageFolder):
    """A Folder whose images a diffusion model sees in their own shapes (`shaped`); their middle squares are what all else sees.

    size: the shapes are of about its square in pixels.  widest: no shape's sides are further apart than this to 1.
    Raises UserError as Folder does.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int | None = None,
        channels: int | None = None,
        captions: str | Path | None = None,
        test_fraction: float = 0.02,
        max_unreadable: float = 0.2,
        max_aspect_ratio: float = 2.0,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        if max_aspect_ratio < 1:
            raise UserError(f"max_aspect_ratio={max_aspect_ratio}: expected 1, for squares alone, or more")
        super().__init__(path, split, size, channels, captions, test_fraction, max_unreadable, None, seed, flip)
        made_of = (os.path.realpath(self.root), *map(tuple, self.readable))
        seen, _ = cached("files", made_of, lambda: (image_sizes(self.root, self.readable), None))
        place = {file: i for i, file in enumerate(self.readable)}
        self.widest, self.sizes = max_aspect_ratio, seen[[place[file] for file in self.files], :2].tolist()
        self.content = sha256(f"{self.content}{seen[:, 2].tolist()}".encode()).hexdigest()[
            :16
        ]  # squares are not all that is seen
        self.check_content(content_hash)

    def to_buckets(self, multiple: int) -> "BucketedDataset":
        """The samples in shapes whose sides are multiples of `multiple`. Raises UserError for a size below that."""
        if self.size < multiple:
            raise UserError(
                f"size={self.size}: expected {multiple} or more, what the first stage and the net divide sides by"
            )
        options = bucket_shapes(self.size, multiple, self.widest)
        buckets = [nearest_bucket((height, width), options) for height, width in self.sizes]
        parts = []
        for bucket in sorted(set(buckets)):
            files = [file for file, own in zip(self.files, buckets, strict=True) if own == bucket]
            pack = decode_all(self.root, files, options[bucket], self.channels)
            if pack.skipped:
                raise UserError(
                    f"path={self.root}: {next(iter(pack.skipped))} could be read before and cannot be now; put it back"
                )
            parts.append(
                InMemoryDataset("shape", pack.images, torch.zeros(len(files)), {"image": [""]}, self.seed, self.flip)
            )
        return BucketedDataset(self, parts, [sorted(set(buckets)).index(bucket) for bucket in buckets])


class BucketedDataset(Dataset):
    """dataset with images of several shapes: image (B, channels, height, width), one shape a batch, as `stream` gives them.

    parts: the images of each shape.  buckets: of each sample, the part whose next image is its.  All else is the data set's own.
    """

    def __init__(self, dataset: Any, parts: Sequence[InMemoryDataset], buckets: Sequence[int]):
        counted = torch.tensor(buckets).bincount(minlength=len(parts)).tolist()
        if counted != [len(part) for part in parts]:
            raise ValueError(f"parts of {[len(part) for part in parts]} images do not fit buckets of {counted}")
        self.dataset, self.parts, self.buckets = dataset, list(parts), tuple(buckets)
        self.bucket = torch.tensor(buckets)
        self.place = torch.zeros(len(buckets), dtype=torch.long)  # of each sample in its part
        for bucket, count in enumerate(counted):
            self.place[self.bucket == bucket] = torch.arange(count)

    def __len__(self) -> int:
        return len(self.buckets)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # asked for by pickle before there is a data set
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) of each part's images."""
        return [(part.stored.shape[2], part.stored.shape[3]) for part in self.parts]

    def stream(
        self, batch: int, steps: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1
    ) -> BucketStream:
        """The batches of a training."""
        return BucketStream(len(self), batch, steps, seed, start, rank, world, buckets=self.buckets)

    def batch(self, at: Sequence[tuple[int, int]]) -> dict:
        """The samples at (place, index) pairs, all of one shape. Raises ValueError for others."""
        batch = self.dataset.batch_metadata(at)
        return {"image": flip_where(self.pixels(batch["index"]), batch["flip"]), **batch}

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Images (B, channels, height, width) float32 in [-1, 1] of one shape, never flipped."""
        bucket, places = self.locate(index)
        return self.parts[bucket].pixels(places)

    def locate(self, index: Sequence[int] | Tensor) -> tuple[int, Tensor]:
        """The part in which samples are, and where in it. Raises ValueError unless they are all in one."""
        at = torch.as_tensor(index)
        found = self.bucket[at].unique().tolist()
        if len(found) != 1:
            raise ValueError(f"a batch of {len(found)} shapes cannot be stacked; take batches from `stream`")
        return found[0], self.place[at]

    def joined(self, moments: Sequence[Tensor]) -> "BucketedTensors":
        """What was made of each part's images (flips, N_b, ...), looked up by sample."""
        return BucketedTensors(self, moments)


@dataclass(frozen=True)
class BucketedTensors:
    """Tensors of several shapes (flips, N_b, ...) as one (flips, N, ...), looked up by [flip, index], rows of one shape at a time."""

    data: BucketedDataset
    parts: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], len(self.data)

    def __getitem__(self, at: tuple[Tensor, Tensor]) -> Tensor:
        flip, index = at
        bucket, places = self.data.locate(index)
        return self.parts[bucket][flip, places]


def image_sizes(root: Path, files: Sequence[File]) -> Tensor:
    """(N, 3) int64: of each file height and width of its image, turned as its EXIF says, and a key of its bytes."""
    rows = []
    for name in (file.name for file in files):
        data = (root / name).read_bytes()
        with open_image(io.BytesIO(data)) as file:
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            height, width = file.size if turned else file.size[::-1]
        rows.append([height, width, derive_seed(sha256(data).hexdigest())])
    return torch.tensor(rows)
