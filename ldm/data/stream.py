"""An endless stream of batches, a pure function of the step: resumable, equal for any number of workers or ranks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import ConfigError
from ldm.tensors import derive_seed

# above this length the order is not a list but computed where it is needed, which takes no memory
MAX_LISTED_SAMPLES = 1 << 20  # samples
ROUNDS = 6  # of the Feistel network


class BatchSlice(NamedTuple):
    """One rank's part of the global batch of a step."""

    samples: list[tuple[int, int]]  # (epoch, index): the pass over the data and the sample's index in the data set
    position: list[int]  # each row's position in the global batch
    total: int  # rows in the global batch
    step: int


@dataclass(frozen=True)
class BatchStream:
    """The batches of steps `start` to steps - 1, as BatchSlices.

    Use it as DataLoader(BatchDataset(dataset), sampler=BatchStream(...), batch_size=None).
    length: samples in the data set; None for one without an end, whose samples are taken in their own order: (0, 0),
    (0, 1), ...
    batch: the GLOBAL batch size, which need not divide length: batches run on into the next epoch.
    The order in epoch e is a permutation seeded by (seed, "order", e).
    Rank r of `world` takes a contiguous slice of each batch.
    Raises ValueError.
    """

    length: int | None
    batch: int
    steps: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if self.length is not None and self.length < 1:
            raise ConfigError("the data set is empty")
        if not (self.batch >= self.world >= 1 and 0 <= self.rank < self.world):
            raise ValueError(
                f"batch={self.batch} rows cannot be divided between ranks (rank {self.rank} of {self.world}): "
                f"expected at least one row per rank"
            )
        if not 0 <= self.start <= self.steps:
            raise ConfigError(f"start={self.start}: expected a step from 0 to steps={self.steps}")

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[BatchSlice]:
        return map(self.batch_at, range(self.start, self.steps))

    def batch_at(self, step: int) -> BatchSlice:
        """Return this rank's slice of the batch of any step >= 0."""
        low, high = (self.batch * r // self.world for r in (self.rank, self.rank + 1))
        turns = range(step * self.batch + low, step * self.batch + high)
        samples = [(0, i) for i in turns] if self.length is None else self._in_epochs(turns, self.length)
        return BatchSlice(samples, list(range(low, high)), self.batch, step)

    def _in_epochs(self, turns: range, length: int) -> list[tuple[int, int]]:
        """Return the samples whose turn it is, of epochs of `length` samples."""
        samples: list[tuple[int, int]] = []
        for e, run in groupby(turns, lambda i: i // length):
            samples += ((e, i) for i in self._permuted(e, [i - e * length for i in run], length))
        return samples

    def _permuted(self, epoch: int, positions: list[int], length: int) -> list[int]:
        """Return the samples at these positions of the order of an epoch of `length` samples."""
        if length <= MAX_LISTED_SAMPLES:
            order = _order(self.seed, epoch, length)
            return [order[i] for i in positions]
        keys = [derive_seed(self.seed, "order", epoch, turn) for turn in range(ROUNDS)]
        return feistel_permutation(torch.tensor(positions), length, keys).tolist()


def feistel_permutation(positions: Tensor, length: int, keys: Sequence[int]) -> Tensor:
    """Return the values at `positions` (N,) int64 of a permutation of 0..length-1, computed for these positions alone.

    It is a Feistel network (Luby & Rackoff 1988) on a power of four >= length, iterated until the value is below length
    (cycle walking, Black & Rogaway 2002).  keys: 63 bits each, one per round.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    values, left_out = positions.clone(), torch.ones_like(positions, dtype=torch.bool)
    while left_out.any():
        left, right = values[left_out] >> half, values[left_out] & mask
        for key in keys:
            mixed = (right ^ key) * 0x1E3779B97F4A7C15
            mixed = (mixed ^ (mixed >> 32)) * 0x3F58476D1CE4E5B9
            left, right = right, left ^ ((mixed >> 28) & mask)
        values[left_out] = (left << half) | right
        left_out = values >= length
    return values


class Samples(Protocol):
    """What training on images needs of a data set: a sample is a function of (epoch, index) alone.

    A data set with a length has the indices 0 to len - 1 in each epoch; one without is asked for (0, i), where i counts
    the samples from the start of the training, and must give the same sample i at any time, in any process and in any
    batch: this is what makes a resumed training equal to an uninterrupted one.
    shape: of a sample, channels first.  classes: their names, none without labels.  captions: of each class, or in one
    list without classes; none without captions.  flip: whether a batch may have samples mirrored along their last axis.
    fingerprint: text that changes when the samples do.
    """

    shape: Sequence[int]
    classes: Sequence[str]
    captions: Sequence[Sequence[str]]
    flip: bool
    fingerprint: str

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return image (B, *shape) float32 in [-1, 1], flip (B,) bool, and the lists index and epoch.

        Besides label (B,) int64, -1 for none, if there are classes, and the list caption, "" for none, if there are
        captions.
        """
        ...


def length_of(dataset: Any) -> int | None:
    """Return the number of samples of a data set, None for a stream without an end."""
    try:
        return len(dataset)
    except TypeError as error:  # a wrapper has a __len__, which asks the data set
        if "has no len()" not in str(error):
            raise
        return None


def make_stream(dataset: Any) -> Callable[..., Any]:
    """Return the constructor (batch, steps, seed, start, rank, world) of a data set's stream of batches.

    It is the data set's own, if it has one, as data of several shapes have.
    """
    if hasattr(dataset, "stream"):
        return dataset.stream
    return partial(BatchStream, length_of(dataset))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> list[int]:
    """Return the permutation of the samples in an epoch."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(derive_seed(seed, "order", epoch))).tolist()


class BatchDataset(Dataset):
    """A data set indexed by BatchSlice: dataset.batch(samples) plus position (list), total and step of the slice."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, part: BatchSlice) -> dict:
        return {**self.dataset.batch(part.samples), "position": part.position, "total": part.total, "step": part.step}
