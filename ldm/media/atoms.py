"""Atoms in space (3 + elements, atoms): an .xyz file and a drawing as balls and bonds, seen along z."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.io.atoms import ELEMENTS, REACH, atoms_fault, from_sample
from ldm.io.images import make_grid
from ldm.media.files import write_sample

IS_PICTURE = False
SIDE = 200  # pixels of a drawing
RADII = {"H": 0.31, "C": 0.76, "N": 0.71, "O": 0.66, "F": 0.57}  # covalent, angstrom (Cordero et al. 2008)
COLOURS = {"H": "#e6e6e6", "C": "#404040", "N": "#3050f8", "O": "#ff0d0d", "F": "#50c050"}
SLACK = 1.2  # atoms nearer than so many times the sum of their radii are drawn with a bond


def write(stem: Path, sample: Tensor, metadata: Mapping[str, str]) -> list[Path]:
    """Write a sample as STEM.xyz, in angstrom, and STEM.png, a drawing with the metadata in it."""
    text = from_sample(sample.cpu()).to_xyz(metadata.get("prompt", ""))
    return write_sample(stem, {".xyz": text.encode()}, draw(sample).float() / 127.5 - 1, metadata)


def sheet(samples: Sequence[Tensor], columns: int) -> Tensor:
    """Draw samples and arrange them in rows; return (3, H, W) in [-1, 1]."""
    return make_grid(torch.stack([draw(sample) for sample in samples]), columns).float() / 127.5 - 1


def fault(shape: Sequence[int]) -> str:
    """Return why samples of a shape are no atoms, "" if they are."""
    return atoms_fault(shape)


def draw(sample: Tensor, side: int = SIDE) -> Tensor:
    """Draw atoms from the farthest to the nearest, with lines between neighbours: (3, side, side) uint8."""
    from PIL import Image, ImageDraw

    atoms = from_sample(sample.cpu())
    picture = Image.new("RGB", (side, side), "white")
    pen, scale = ImageDraw.Draw(picture), side / (2 * REACH) * 1.6
    names = [ELEMENTS[element] for element in atoms.elements.tolist()]
    radii = torch.tensor([RADII[name] for name in names])
    places = [(side / 2 + scale * x, side / 2 - scale * y) for x, y, _ in atoms.positions.tolist()]
    near = torch.cdist(atoms.positions, atoms.positions) < SLACK * (radii[:, None] + radii)
    for i, j in near.triu(1).nonzero().tolist():
        pen.line([*places[i], *places[j]], "#808080", 3)
    for i in atoms.positions[:, 2].argsort().tolist():
        (x, y), r = places[i], 0.5 * scale * float(radii[i])
        pen.ellipse([x - r, y - r, x + r, y + r], COLOURS[names[i]], "#404040")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
