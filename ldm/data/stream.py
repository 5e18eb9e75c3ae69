"""An endless stream of batches that is a pure function of the step: resumable anywhere, equal for any number of workers or ranks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import ConfigError
from ldm.tensors import derive_seed

MAX_LISTED_SAMPLES = (
    1 << 20
)  # samples whose order is a list; that of more is computed where it is needed, and takes no memory
ROUNDS = 6


class BatchSlice(NamedTuple):
    """One rank's part of a global batch."""

    samples: list[tuple[int, int]]  # (place, index): the pass over the data and the sample's index in it
    position: list[int]  # where each row stands in the global batch
    total: int  # rows in the global batch
    step: int


@dataclass(frozen=True)
class BatchStream:
    """Batches for steps start to steps - 1, as Slices; sampler of DataLoader(Batched(dataset), sampler=Stream(...), batch_size=None).

    length: samples in the data set.  batch: the GLOBAL batch size, which need not divide length: batches run on into the next pass.
    Pass e is a permutation of key(seed, "order", e).  Rank r of world takes a contiguous slice.  Raises ValueError.
    """

    length: int
    batch: int
    steps: int
    seed: int = 0
    start: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self):
        if self.length < 1:
            raise ConfigError("the data set is empty")
        if not (self.batch >= self.world >= 1 and 0 <= self.rank < self.world):
            raise ValueError(
                f"batch={self.batch} rows cannot be shared out to rank {self.rank} of {self.world}: at least one row a rank"
            )
        if not 0 <= self.start <= self.steps:
            raise ConfigError(f"start={self.start}: expected a step from 0 to steps={self.steps}")

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[BatchSlice]:
        return map(self.batch_at, range(self.start, self.steps))

    def batch_at(self, step: int) -> BatchSlice:
        """This rank's slice of the batch of any step >= 0."""
        low, high = (self.batch * r // self.world for r in (self.rank, self.rank + 1))
        at: list[tuple[int, int]] = []
        for e, run in groupby(range(step * self.batch + low, step * self.batch + high), lambda i: i // self.length):
            at += ((e, i) for i in self._drawn(e, [i - e * self.length for i in run]))
        return BatchSlice(at, list(range(low, high)), self.batch, step)

    def _drawn(self, place: int, at: list[int]) -> list[int]:
        """What stands at these positions of a pass."""
        if self.length <= MAX_LISTED_SAMPLES:
            order = _order(self.seed, place, self.length)
            return [order[i] for i in at]
        return feistel_permutation(
            torch.tensor(at), self.length, [derive_seed(self.seed, "order", place, turn) for turn in range(ROUNDS)]
        ).tolist()


def feistel_permutation(at: Tensor, length: int, keys: Sequence[int]) -> Tensor:
    """The values at positions `at` (N,) int64 of a permutation of 0..length-1, which is computed for these alone.

    A Feistel network (Luby & Rackoff 1988) on a power of four that holds length, walked on until it is below length (Black & Rogaway
    2002); the keys are 63 bits each, one a round.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    found, left_out = at.clone(), torch.ones_like(at, dtype=torch.bool)
    while left_out.any():
        left, right = found[left_out] >> half, found[left_out] & mask
        for one in keys:
            mixed = (right ^ one) * 0x1E3779B97F4A7C15
            mixed = (mixed ^ (mixed >> 32)) * 0x3F58476D1CE4E5B9
            left, right = right, left ^ ((mixed >> 28) & mask)
        found[left_out] = (left << half) | right
        left_out = found >= length
    return found


@lru_cache(maxsize=4)
def _order(seed: int, place: int, length: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(derive_seed(seed, "order", place))).tolist()


class BatchDataset(Dataset):
    """A data set read by Slice: dataset.batch(at) plus its position (list) in the global batch, total (int) and step."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, part: BatchSlice) -> dict:
        return {**self.dataset.batch(part.samples), "position": part.position, "total": part.total, "step": part.step}
