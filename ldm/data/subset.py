"""Some samples of a data set, chosen by a key."""

import heapq
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ldm.tensors import derive_seed


class Subset(Dataset):
    """The given rows of a data set, in that order, with the methods that a LatentDataset and its cache need.

    Captions, flips, masks and low resolutions are those of the row in the data set; `index` counts within the subset.
    """

    def __init__(self, dataset: Any, rows: Sequence[int]):
        self.dataset, self.rows, self.flip = dataset, list(rows), dataset.flip

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Identity of the pixels."""
        return f"{self.dataset.fingerprint}-{sha256(repr(self.rows).encode()).hexdigest()[:16]}"

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the samples, (epoch, index) pairs, as the data set gives them."""
        return self.dataset.batch(self._samples(samples)) | {"index": [i for _, i in samples]}

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return a batch without its images."""
        return self.dataset.batch_metadata(self._samples(samples)) | {"index": [i for _, i in samples]}

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Return images (B, C, H, W) float32 in [-1, 1], never flipped."""
        return self.dataset.pixels([self.rows[i] for i in index])

    def _samples(self, samples: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(epoch, self.rows[i]) for epoch, i in samples]


def choose_rows(length: int, num: int, seed: int) -> list[int]:
    """Choose `num` of range(length), all if there are fewer; a smaller num gives the first ones of a larger."""
    return heapq.nsmallest(num, range(length), key=lambda row: derive_seed(seed, "validation", row))
