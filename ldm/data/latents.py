"""A data set seen through a first stage: cached posterior moments instead of images."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset


class Latents(Dataset):
    """dataset with `moments` (B, 2C, h, w) float32 in place of `image`.

    moments: (flips, N, 2C, h, w), flips = 2 where the data set flips at random, row 1 that of the mirrored image; else 1.
    """

    def __init__(self, dataset, moments: Tensor):
        flips = 2 if dataset.flip else 1
        if moments.shape[:2] != (flips, len(dataset)):
            raise ValueError(f"moments of {tuple(moments.shape[:2])} (flips, images) do not fit a data set of ({flips}, {len(dataset)})")
        self.dataset, self.moments = dataset, moments

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, at: Sequence[tuple[int, int]]) -> dict:
        """The samples at (place, index) pairs, as the data set gives them but for `image`."""
        batch = self.dataset.about(at)
        return {**batch, "moments": self.moments[batch["flip"].long(), torch.as_tensor(batch["index"])].float()}


@torch.no_grad()
def encode_all(posterior: Callable[[Tensor], Tensor], images: Iterator[Tensor]) -> Tensor:
    """Moments of batches of images (B, C, H, W) in [-1, 1], as one float16 tensor (N, 2C, h, w); posterior: image -> moments."""
    return torch.cat([posterior(image).half().cpu() for image in images])
