"""A data set that changes another one, and has everything else of it."""

from typing import Any

from torch import Generator
from torch.utils.data import Dataset

from ldm.tensors import derive_seed


class WrappedDataset(Dataset):
    """A data set with the attributes and methods of `dataset`, but those that a subclass defines.

    A subclass with random choices of its own sets `seed`.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # pickle reads attributes before `dataset` is set
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def generator(self, purpose: str, epoch: int, index: int) -> Generator:
        """Return the generator for the random choices for one sample in one epoch."""
        return Generator().manual_seed(derive_seed(self.seed, purpose, epoch, index))
