"""Molecules as sets of atoms in space, and as samples (3 + elements, MAX_ATOMS): coordinates, and one-hot elements."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from ldm.errors import UserError

ELEMENTS = ("H", "C", "N", "O", "F")  # of QM9
MAX_ATOMS = 29
REACH = 8.0  # angstrom, the largest coordinate of a sample


@dataclass(frozen=True)
class Atoms:
    """A molecule in space.

    positions: (n, 3) float32 in angstrom, from their mean.  elements: (n,) int64, of ELEMENTS.
    """

    positions: Tensor
    elements: Tensor

    def to_xyz(self, comment: str = "") -> str:
        """Return the text of an .xyz file."""
        rows = zip(self.elements.tolist(), self.positions.tolist(), strict=True)
        lines = [f"{ELEMENTS[element]} {x:.5f} {y:.5f} {z:.5f}" for element, (x, y, z) in rows]
        return "\n".join([str(len(lines)), " ".join(comment.split()), *lines, ""])


def to_sample(atoms: Atoms) -> Tensor:
    """Return a sample (3 + elements, MAX_ATOMS) float32 in [-1, 1].

    Rows 0 to 2 are coordinates / REACH, the others 1 for the element and -1 else; where there is no atom, coordinates
    are 0 and no element is 1.  Raises UserError for no atoms, too many, or atoms that reach further.
    """
    n = len(atoms.elements)
    if not 1 <= n <= MAX_ATOMS or not atoms.positions.isfinite().all() or atoms.positions.abs().max() > REACH:
        raise UserError(f"{n} atoms: expected 1 to {MAX_ATOMS}, within {REACH:g} angstrom of their mean on each axis")
    kinds = one_hot(atoms.elements, len(ELEMENTS)).T.float() * 2 - 1
    missing = MAX_ATOMS - n
    return torch.cat([pad(atoms.positions.T / REACH, (0, missing)), pad(kinds, (0, missing), value=-1.0)])


def from_sample(sample: Tensor) -> Atoms:
    """Return the atoms of a sample (3 + elements, MAX_ATOMS), centred: those with an element above 0.

    Raises UserError for a sample of another shape.
    """
    if fault := atoms_fault(sample.shape):
        raise UserError(fault)
    largest, elements = sample[3:].float().max(0)
    present = largest > 0
    positions = sample[:3, present].T.float() * REACH
    return Atoms(positions - positions.mean(0) if len(positions) else positions, elements[present])


def atoms_fault(shape: Sequence[int]) -> str:
    """Return why samples of a shape are no atoms, "" if they are."""
    expected = (3 + len(ELEMENTS), MAX_ATOMS)
    return "" if tuple(shape) == expected else f"samples of shape {tuple(shape)} are no atoms; expected {expected}"


def random_rotation(generator: torch.Generator) -> Tensor:
    """Return a uniformly random rotation (3, 3) float32: that of a normal quaternion (Shoemake 1992)."""
    w, x, y, z = torch.nn.functional.normalize(torch.randn(4, generator=generator, dtype=torch.float64), dim=0).tolist()
    rotation = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.tensor(rotation)
