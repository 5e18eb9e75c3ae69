"""An endless stream of batches that is a pure function of the step: resumable anywhere, equal for any number of workers or ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from ldm.tensors import key


class Slice(NamedTuple):
    """One rank's part of a global batch."""

    at: list[tuple[int, int]]  # (place, index): the pass over the data and the sample's index in it
    position: list[int]  # where each row stands in the global batch
    total: int  # rows in the global batch
    step: int


@dataclass(frozen=True)
class Stream:
    """Batches for steps start to steps - 1, as Slices; sampler of DataLoader(Batched(dataset), sampler=Stream(...), batch_size=None).

    length: samples in the data set.  batch: the GLOBAL batch size, which need not divide length: batches run on into the next pass.
    Pass e is the permutation drawn with key(seed, "order", e).  Rank r of world takes a contiguous slice.  Raises ValueError.
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
        low, high = (self.batch * r // self.world for r in (self.rank, self.rank + 1))
        where = (divmod(step * self.batch + i, self.length) for i in range(low, high))
        return Slice([(e, _order(self.seed, e, self.length)[i]) for e, i in where], list(range(low, high)), self.batch, step)


@lru_cache(maxsize=4)
def _order(seed: int, place: int, length: int) -> list[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(key(seed, "order", place))).tolist()


class Batched(Dataset):
    """A data set read by Slice: dataset.batch(at) plus its position (list) in the global batch, total (int) and step."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, part: Slice) -> dict:
        return {**self.dataset.batch(part.at), "position": part.position, "total": part.total, "step": part.step}
