"""QM9 (Ramakrishnan et al. 2014): molecules of up to nine heavy atoms in space, as padded sets of atoms."""

import csv
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.image_cache import cached
from ldm.data.memory import InMemoryDataset
from ldm.errors import ConfigError, UserError
from ldm.io.atoms import ELEMENTS, Atoms, random_rotation, to_sample
from ldm.io.download import fetch, from_wheel
from ldm.io.parse import parse_json
from ldm.tensors import derive_seed

FILES = {  # qm9_polarizability.csv of the same folder repeats the rows
    "qm9_part1.csv": "19f0a5d595462d52cd82eef3370f3e9eb55a1f52cb14985657200349568deff3",
    "qm9_part2.csv": "2bca113fdc0b28a13563c80ed9b240e934f3da6c64c64fe74ddb4f0f36036e61",
    "qm9_part3.csv": "9c5efb5733d2af149db8d95d36ff198b4ffed12d9f7b344220a1e5877d5c6a43",
}
READER = 1  # raise it when reading changes its result, so that cached samples are not used
HELD_OUT = 0.1  # of the molecules


class QM9(InMemoryDataset):
    """The 130,831 molecules of QM9: image (8, 29) in [-1, 1], see ldm.io.atoms.

    split: train or test, a tenth, divided by the index of the molecule.
    num: molecules of the split to take, None for all.
    rotate: turn each molecule by a random rotation, a function of (seed, epoch, index); a training needs
    training.latents=online for it, as cached latents are of the molecules as they are.
    root: a folder that may contain the files.
    Raises ConfigError for an invalid option, AssetNotFoundError without the files.
    """

    medium = "atoms"

    def __init__(
        self,
        split: str = "train",
        root: str | Path | None = None,
        num: int | None = None,
        rotate: bool = True,
        seed: int = 0,
    ):
        if split not in ("train", "test"):
            raise ConfigError(f"split={split!r}: expected train or test")
        if num is not None and num < 1:
            raise ConfigError(f"num={num}: expected one molecule or more, or null for all")
        samples, info = cached("qm9", (READER, FILES, ELEMENTS), lambda: read(qm9(root)))
        rows = [
            row
            for row, index in enumerate(info["index"])
            if (derive_seed("held out", index) < HELD_OUT * 2**63) == (split == "test")
        ]
        super().__init__(f"qm9-{split}", samples, rows=torch.tensor(rows[:num]), labels=-torch.ones(len(rows[:num])))
        self.rotate, self.seed, self.rejected = rotate, seed, info["rejected"]

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return the samples, (epoch, index) pairs, each in its rotation; see InMemoryDataset."""
        batch = super().batch(samples)
        if self.rotate:
            turns = torch.stack([self.rotation(epoch, index) for epoch, index in samples])
            batch["image"] = torch.cat([turns @ batch["image"][:, :3], batch["image"][:, 3:]], 1)
        return batch

    def rotation(self, epoch: int, index: int) -> Tensor:
        """Return the rotation (3, 3) of a molecule in an epoch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "rotation", epoch, index))
        return random_rotation(generator)


def qm9(root: str | Path | None = None) -> Path:
    """Return the folder with QM9's FILES.

    root: a folder that may contain them.  Raises AssetNotFoundError.
    """
    source = partial(from_wheel, "qm9pack==1.0.3", "qm9pack/data")
    return fetch("qm9", FILES, [Path(root).expanduser()] if root else [], {"the package qm9pack": source})


def read(folder: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read all molecules: samples (N, 8, 29) float32, and their numbers; others are counted by reason."""
    samples, index = [], []
    rejected: Counter[str] = Counter()
    for name in FILES:
        with open(folder / name, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                try:
                    samples.append(to_sample(parse_atoms(row)))
                except UserError as error:
                    rejected[str(error)] += 1
                    continue
                index.append(int(row["Index"]))
    if not samples:
        raise UserError(f"{folder}: no molecule; {dict(rejected)}")
    return torch.stack(samples), {"index": index, "rejected": dict(rejected)}


def parse_atoms(row: dict[str, str]) -> Atoms:
    """Return the atoms of a row, centred.  Raises UserError for a row that does not have them."""
    try:
        elements = torch.tensor([ELEMENTS.index(name) for name in parse_json(row["Elements"].replace("'", '"'))])
        positions = torch.tensor(parse_json(row["XYZ_Ang"]), dtype=torch.float64)
    except (KeyError, TypeError, ValueError):
        raise UserError("elements or coordinates that cannot be read") from None
    if positions.shape != (len(elements), 3):
        raise UserError("as many coordinates as elements were expected")
    return Atoms((positions - positions.mean(0)).float(), elements)
