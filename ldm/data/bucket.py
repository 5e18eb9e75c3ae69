"""Images of several shapes: each scaled to the nearest of a few shapes of one area, and batches of a single shape."""

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

from ldm.data.decode import open_image
from ldm.data.folder import File, ImageFolder, decode_all
from ldm.data.image_cache import cached
from ldm.data.memory import InMemoryDataset, flip_where
from ldm.data.stream import BatchSlice, BatchStream
from ldm.data.wrapper import WrappedDataset
from ldm.errors import ConfigError, UserError
from ldm.tensors import derive_seed


def bucket_shapes(side: int, multiple: int = 64, widest: float = 2.0) -> list[tuple[int, int]]:
    """Return the (height, width) of all buckets, tallest first (SDXL, Podell et al. 2023, section 2.3).

    Sides are multiples of `multiple`, the area is at most side^2 pixels, the aspect ratio at most `widest`.
    Raises ConfigError if not even the square fits.
    """
    if side < multiple:
        raise ConfigError(f"side={side}: expected {multiple} or more, one multiple")
    shapes = {
        (height, width)
        for height in range(multiple, int(side * math.sqrt(widest)) + 1, multiple)
        for width in [side * side // height // multiple * multiple]
        if width and max(height / width, width / height) <= widest
    }
    shapes |= {(width, height) for height, width in shapes}
    return sorted(shapes, key=lambda shape: (shape[1] / shape[0], shape))


def nearest_bucket(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> int:
    """Return the index of the shape whose aspect ratio is nearest to that of (height, width), by its logarithm.

    Of equal ones it is the one with most pixels.
    """
    ratio = math.log(size[1] / size[0])
    return min(
        range(len(shapes)), key=lambda i: (abs(math.log(shapes[i][1] / shapes[i][0]) - ratio), -math.prod(shapes[i]))
    )


@dataclass(frozen=True)
class BucketStream(BatchStream):
    """A BatchStream whose batches each contain samples of a single bucket: a pure function of the step.

    buckets: bucket of each sample. Each bucket is an endless stream of its own epochs, of which each step takes the
    next `batch` samples. In the long run each bucket comes in proportion to its size, in an order that is random in
    each epoch of the data.
    """

    buckets: tuple[int, ...] = field(kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if len(self.buckets) != self.length:
            raise ValueError(f"{len(self.buckets)} buckets for {self.length} samples: expected one per sample")

    def batch_at(self, step: int) -> BatchSlice:
        """Return this rank's slice of the batch of any step >= 0."""
        members = _members(self.buckets)
        sizes = [len(rows) for rows in members]
        # each bucket is less than a batch behind its share, so more steps than this come before any later epoch
        epochs = range(self.batch * (step + len(sizes)) // len(self.buckets) + 1)
        epoch = bisect_right(epochs, step, key=lambda e: _steps_before(sizes, self.batch, e)) - 1
        first = _steps_before(sizes, self.batch, epoch)
        bucket, turn = _plan(tuple(sizes), self.batch, self.seed, epoch)[step - first]
        low, high = (self.batch * r // self.world for r in (self.rank, self.rank + 1))
        positions = (divmod(turn * self.batch + i, sizes[bucket]) for i in range(low, high))
        samples = [(e, members[bucket][_order(self.seed, bucket, e, sizes[bucket])[i]]) for e, i in positions]
        return BatchSlice(samples, list(range(low, high)), self.batch, step)


def _steps_before(sizes: Sequence[int], batch: int, epoch: int) -> int:
    """Return the number of steps before `epoch`: for each bucket, the full batches that its epochs so far contain."""
    return sum(epoch * size // batch for size in sizes)


@lru_cache(maxsize=4)
def _members(buckets: tuple[int, ...]) -> list[list[int]]:
    """Return the samples of each bucket, by bucket number."""
    members: dict[int, list[int]] = {}
    for i, bucket in enumerate(buckets):
        members.setdefault(bucket, []).append(i)
    return [members[bucket] for bucket in sorted(members)]


@lru_cache(maxsize=4)
def _plan(sizes: tuple[int, ...], batch: int, seed: int, epoch: int) -> list[tuple[int, int]]:
    """Return (bucket, number of batches taken from it before) for each step of an epoch, in random order."""
    turns = [(b, k) for b, size in enumerate(sizes) for k in range(epoch * size // batch, (epoch + 1) * size // batch)]
    order = torch.randperm(
        len(turns), generator=torch.Generator().manual_seed(derive_seed(seed, "buckets", epoch))
    ).tolist()
    return [turns[i] for i in order]


@lru_cache(maxsize=64)
def _order(seed: int, bucket: int, epoch: int, length: int) -> list[int]:
    """Return the permutation of a bucket's samples in one of its epochs."""
    return torch.randperm(
        length, generator=torch.Generator().manual_seed(derive_seed(seed, "order", bucket, epoch))
    ).tolist()


class BucketedFolder(ImageFolder):
    """An ImageFolder whose images keep about their own aspect ratios when a diffusion model is trained (`to_buckets`).

    Everything else gets the centre squares.
    size: the area of the shapes is about its square, in pixels.  max_aspect_ratio: limit for the shapes.
    Raises UserError as ImageFolder does.
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
            raise UserError(f"max_aspect_ratio={max_aspect_ratio}: expected 1, for squares only, or more")
        super().__init__(path, split, size, channels, captions, test_fraction, max_unreadable, None, seed, flip)
        key = (os.path.realpath(self.root), *map(tuple, self.readable))
        headers, _ = cached("files", key, lambda: (image_sizes(self.root, self.readable), None))
        row = {file: i for i, file in enumerate(self.readable)}
        self.widest, self.sizes = max_aspect_ratio, headers[[row[file] for file in self.files], :2].tolist()
        # the files' bytes too, as more than the squares is used
        self.content = sha256(f"{self.content}{headers[:, 2].tolist()}".encode()).hexdigest()[:16]
        self.check_content(content_hash)

    def to_buckets(self, multiple: int) -> "BucketedDataset":
        """Return the samples in shapes whose sides are multiples of `multiple`.

        Raises UserError for a size below that.
        """
        side = self.shape[1]
        if side < multiple:
            raise UserError(
                f"size={side}: expected {multiple} or more, the multiple that the first stage and the net require"
            )
        options = bucket_shapes(side, multiple, self.widest)
        buckets = [nearest_bucket((height, width), options) for height, width in self.sizes]
        parts = []
        for bucket in sorted(set(buckets)):
            files = [file for file, assigned in zip(self.files, buckets, strict=True) if assigned == bucket]
            pack = decode_all(self.root, files, options[bucket], self.shape[0])
            if pack.skipped:
                raise UserError(
                    f"path={self.root}: {next(iter(pack.skipped))} could be read before and cannot be now; put it back"
                )
            parts.append(
                InMemoryDataset("shape", pack.images, torch.zeros(len(files)), {"image": [""]}, self.seed, self.flip)
            )
        return BucketedDataset(self, parts, [sorted(set(buckets)).index(bucket) for bucket in buckets])


class BucketedDataset(WrappedDataset):
    """A data set with images of several shapes: image (B, channels, height, width), one shape per batch.

    `stream` gives such batches.
    parts: the images of each shape.  buckets: for each sample, the part that contains its image, in order.
    Everything else is the data set's.
    """

    def __init__(self, dataset: Any, parts: Sequence[InMemoryDataset], buckets: Sequence[int]):
        counts = torch.tensor(buckets).bincount(minlength=len(parts)).tolist()
        if counts != [len(part) for part in parts]:
            raise ValueError(f"parts of {[len(part) for part in parts]} images do not fit buckets of {counts}")
        super().__init__(dataset)
        self.parts, self.buckets = list(parts), tuple(buckets)
        self.bucket = torch.tensor(buckets)
        self.part_rows = torch.zeros(len(buckets), dtype=torch.long)  # of each sample in its part
        for bucket, count in enumerate(counts):
            self.part_rows[self.bucket == bucket] = torch.arange(count)

    def __len__(self) -> int:
        return len(self.buckets)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(height, width) of the images of each part."""
        return [(part.stored.shape[2], part.stored.shape[3]) for part in self.parts]

    def stream(
        self, batch: int, steps: int, seed: int = 0, start: int = 0, rank: int = 0, world: int = 1
    ) -> BucketStream:
        """Return the stream of training batches; see BatchStream."""
        return BucketStream(len(self), batch, steps, seed, start, rank, world, buckets=self.buckets)

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return the samples, (epoch, index) pairs, all of one shape. Raises ValueError if their shapes differ."""
        batch = self.dataset.batch_metadata(samples)
        return {"image": flip_where(self.pixels(batch["index"]), batch["flip"]), **batch}

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Return images (B, channels, height, width) float32 in [-1, 1], all of one shape, never flipped."""
        bucket, rows = self.locate(index)
        return self.parts[bucket].pixels(rows)

    def locate(self, index: Sequence[int] | Tensor) -> tuple[int, Tensor]:
        """Return the part that contains the samples, and their rows in it.

        Raises ValueError if they are in several parts.
        """
        index = torch.as_tensor(index)
        buckets = self.bucket[index].unique().tolist()
        if len(buckets) != 1:
            raise ValueError(f"a batch of {len(buckets)} shapes cannot be stacked; take batches from `stream`")
        return buckets[0], self.part_rows[index]

    def joined(self, moments: Sequence[Tensor]) -> "BucketedTensors":
        """Return tensors computed from each part's images (flips, N_b, ...) as one table indexed by sample."""
        return BucketedTensors(self, moments)


@dataclass(frozen=True)
class BucketedTensors:
    """Tensors (flips, N_b, ...) of several shapes, indexed as one tensor (flips, N, ...).

    [flip, index] looks up samples that all have one shape.
    """

    data: BucketedDataset
    parts: Sequence[Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(flips, N): the axes that are indexed."""
        return self.parts[0].shape[0], len(self.data)

    def __getitem__(self, key: tuple[Tensor, Tensor]) -> Tensor:
        flip, index = key
        bucket, rows = self.data.locate(index)
        return self.parts[bucket][flip, rows]


def image_sizes(root: Path, files: Sequence[File]) -> Tensor:
    """Return (N, 3) int64: each image's height and width, rotated as EXIF says, and a key of the file's bytes."""
    rows = []
    for name in (file.name for file in files):
        data = (root / name).read_bytes()
        with open_image(io.BytesIO(data)) as file:
            transposed = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            height, width = file.size if transposed else file.size[::-1]
        rows.append([height, width, derive_seed(sha256(data).hexdigest())])
    return torch.tensor(rows)
