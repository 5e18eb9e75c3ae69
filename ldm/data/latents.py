"""A data set encoded by a first stage: cached posterior moments instead of images."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ldm.data.memmap import create_memmap, open_memmap
from ldm.errors import UserError
from ldm.io.progress import ProgressBar


class LatentDataset(Dataset):
    """A data set with posterior moments in its batches: `moments` (B, 2C, h, w) float32.

    image: whether batches also have the image.
    moments: (flips, N, 2C, h, w) float16, from encode_latents or read_latents, in memory or mapped from the disk; flips
    = 2 if the data set flips at random, where [1] is the mirrored image; else 1. For images of several shapes: an
    object that is indexed like such a tensor.
    """

    def __init__(self, dataset, moments: Any, image: bool = False):
        flips = 2 if dataset.flip else 1
        if moments.shape[:2] != (flips, len(dataset)):
            raise ValueError(
                f"moments of {tuple(moments.shape[:2])} (flips, images) do not fit a data set of "
                f"({flips}, {len(dataset)})"
            )
        self.dataset, self.moments, self.image = dataset, moments, image

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def stream(self) -> Any:
        """The data set's own stream of batches; AttributeError if it has none."""
        return self.dataset.stream

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return the samples, (epoch, index) pairs, as the data set gives them, with moments instead of pixels."""
        batch = self.dataset.batch(samples) if self.image else self.dataset.batch_metadata(samples)
        return {**batch, "moments": self.moments[batch["flip"].long(), torch.as_tensor(batch["index"])].float()}


def batches(dataset, size: int = 500, rank: int = 0, ranks: int = 1) -> Iterator[Tensor]:
    """Yield this rank's share of a data set's images, in order, not flipped: batches (B, C, H, W) in [-1, 1]."""
    for start in range(rank * size, len(dataset), ranks * size):
        yield dataset.pixels(range(start, min(start + size, len(dataset))))


def encode_latents(autoencoder, dataset) -> Tensor:
    """Return the moments of every image, and of its mirror image if the data set flips: (flips, N, M, h, w) float16."""
    moments = torch.empty(shape_of(autoencoder, dataset), dtype=torch.float16)
    encode_into(moments, autoencoder, dataset)
    return moments


def write_latents(path: Path, autoencoder, dataset, metadata: Mapping[str, str]) -> None:
    """Write the moments of `encode_latents` to the safetensors file `path`, with one batch in memory at a time."""
    with create_memmap(path, "moments", "F16", shape_of(autoencoder, dataset), metadata) as moments:
        encode_into(moments, autoencoder, dataset)


def read_latents(path: Path) -> Tensor:
    """Map what write_latents wrote from the disk. Raises CorruptFileError naming the file."""
    return open_memmap(path, "moments")


@torch.no_grad()
def shape_of(autoencoder, dataset) -> tuple[int, ...]:
    """Return the shape (flips, N, M, h, w) of a data set's moments."""
    moments = autoencoder.posterior(dataset.pixels([0]).to(device_of(autoencoder))).moments
    return (2 if dataset.flip else 1, len(dataset), *moments.shape[1:])


@torch.no_grad()
def encode_into(moments: Tensor, autoencoder, dataset, size: int = 500) -> None:
    """Write every image's moments, and its mirror image's, into (flips, N, M, h, w).

    Raises UserError if they are not finite.
    """
    bar = ProgressBar("encoding", len(dataset), unit="images")
    device, start = device_of(autoencoder), 0
    for image in batches(dataset, size):
        image = image.to(device)
        for flip, rows in enumerate(moments[:, start : start + len(image)]):
            rows.copy_(autoencoder.posterior(image.flip(-1) if flip else image).moments)
            if not rows.isfinite().all():
                last = start + len(image) - 1
                raise UserError(
                    f"latents of images {start} to {last} are not finite in float16; train the first stage again"
                )
        start += len(image)
        bar.update(start)


def device_of(module: nn.Module) -> torch.device:
    """Return the device of a module's weights."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))
