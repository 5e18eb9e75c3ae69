"""A data set seen through a first stage: cached posterior moments instead of images."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Latents(Dataset):
    """dataset with `moments` (B, 2C, h, w) float32 in place of `image`, or beside it with image=True.

    moments: (flips, N, 2C, h, w), flips = 2 where the data set flips at random, row 1 that of the mirrored image; else 1.
    """

    def __init__(self, dataset, moments: Tensor, image: bool = False):
        flips = 2 if dataset.flip else 1
        if moments.shape[:2] != (flips, len(dataset)):
            raise ValueError(f"moments of {tuple(moments.shape[:2])} (flips, images) do not fit a data set of ({flips}, {len(dataset)})")
        self.dataset, self.moments, self.image = dataset, moments, image

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, at: Sequence[tuple[int, int]]) -> dict:
        """The samples at (place, index) pairs, as the data set gives them but for what stands for their pixels."""
        batch = self.dataset.batch(at) if self.image else self.dataset.about(at)
        return {**batch, "moments": self.moments[batch["flip"].long(), torch.as_tensor(batch["index"])].float()}


def batches(dataset, size: int = 500, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
    """All images of a data set, in order and not flipped, as batches (B, C, H, W) in [-1, 1]; of several processes, this one's share."""
    for start in range(rank * size, len(dataset), ranks * size):
        yield dataset.pixels(range(start, min(start + size, len(dataset))))


@torch.no_grad()
def encode_all(autoencoder: nn.Module, dataset) -> Tensor:
    """The moments of every image, and of its mirror image where the data set flips: (flips, N, 2C, h, w) float16."""
    plain = torch.cat([autoencoder.posterior(image).moments.half() for image in batches(dataset)])
    if not dataset.flip:
        return plain[None]
    mirrored = torch.cat([autoencoder.posterior(image.flip(-1)).moments.half() for image in batches(dataset)])
    return torch.stack([plain, mirrored])
