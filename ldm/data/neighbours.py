"""A data set with the nearest neighbours of its samples in its batches."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.data.wrapper import WrappedDataset


class NeighbourDataset(WrappedDataset):
    """A data set whose batches have rows of tables besides: {name: (N, k) int64} gives batch[name] (B, k)."""

    def __init__(self, dataset: Any, tables: Mapping[str, Tensor]):
        super().__init__(dataset)
        self.tables = dict(tables)

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the samples, (epoch, index) pairs, as the data set gives them, with the rows of the tables."""
        return self._with_rows(self.dataset.batch(samples))

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return a batch without its images."""
        return self._with_rows(self.dataset.batch_metadata(samples))

    def _with_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {name: table[batch["index"]] for name, table in self.tables.items()}
