"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 + 10,000 grey images of clothing in ten classes, captioned."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.data.memory import InMemoryDataset, read_captions
from ldm.data.shape import parse_size
from ldm.errors import ConfigError, UserError
from ldm.io.download import fashion_mnist

FILES = {"train": "train", "test": "t10k"}
CAPTIONS = Path(__file__).with_suffix(".json")


class FashionMNIST(InMemoryDataset):
    """Fashion-MNIST, its 28 px zero-padded to `size`: image (1, H, W) in [-1, 1], background -1.

    split: train or test.  size: in pixels, one number or [height, width].
    root: a folder that may contain the files (else cache, system, download).
    captions: a JSON file {class: [caption, ...]}; by default the one next to this module.
    Raises ConfigError for an invalid option, AssetNotFoundError without the files.
    """

    def __init__(
        self,
        split: str = "train",
        root: str | Path | None = None,
        size: int | Sequence[int] = 32,
        captions: str | Path | None = None,
        seed: int = 0,
        flip: bool = False,
    ):
        if split not in FILES:
            raise ConfigError(f"split={split!r}: expected one of {', '.join(FILES)}")
        height, width = parse_size(size)
        if min(height, width) < 28 or height % 2 or width % 2:
            raise ConfigError(
                f"size={size}: the images have 28 px and are only padded; expected an even number from 28 up"
            )
        folder = fashion_mnist(root)
        images = read_idx(folder / f"{FILES[split]}-images-idx3-ubyte.gz")
        labels = read_idx(folder / f"{FILES[split]}-labels-idx1-ubyte.gz")
        images = pad(images[:, None], [(width - 28) // 2] * 2 + [(height - 28) // 2] * 2)
        super().__init__(f"fashion_mnist-{split}", images, labels, read_captions(captions or CAPTIONS), seed, flip)


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of bytes as a uint8 tensor of the shape that it declares.

    Raises UserError for other files.
    """
    with gzip.open(path) as file:
        content = file.read()
    ndim = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, 4 + 4 * ndim, 4)]
    if not ndim or len(content) != 4 + 4 * ndim + torch.Size(shape).numel():
        raise UserError(f"{path}: not an IDX file of bytes")
    return torch.frombuffer(bytearray(content[4 + 4 * ndim :]), dtype=torch.uint8).reshape(shape)
