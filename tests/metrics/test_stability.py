import math

import pytest
import torch

from ldm.io.atoms import ELEMENTS, Atoms
from ldm.io.molecules import to_smiles
from ldm.metrics.stability import bond_orders, stability, to_molecule


def atoms(*rows: tuple[str, float, float, float]) -> Atoms:
    return Atoms(torch.tensor([row[1:] for row in rows]), torch.tensor([ELEMENTS.index(row[0]) for row in rows]))


def pair(a: str, b: str, distance: float) -> int:
    return int(bond_orders(atoms((a, 0.0, 0.0, 0.0), (b, 0.0, distance, 0.0)))[0, 1])


@pytest.mark.parametrize(
    ("elements", "lengths"),
    [("CC", (1.64, 1.39, 1.23)), ("CN", (1.57, 1.34, 1.19)), ("OC", (1.53, 1.25, 1.16)), ("NN", (1.55, 1.30, 1.13))],
)
def test_bond_order_by_length_and_margin(elements, lengths):
    """EDM's lengths with margins of 10, 5 and 3 picometres: 154, 134, 120 for carbon."""
    found = [pair(*elements, length + side) for length in lengths for side in (0.005, -0.005)]
    assert found == [0, 1, 1, 2, 2, 3]


def test_bond_of_hydrogen_is_single_however_short():
    assert [pair("H", "C", distance) for distance in (1.2, 1.18, 0.5)] == [0, 1, 1]
    assert pair("O", "O", 1.0) == 2


BENZENE = atoms(
    *(("C", 1.40 * math.cos(a), 1.40 * math.sin(a), 0.0) for a in (math.tau * k / 6 for k in range(6))),
    *(("H", 2.48 * math.cos(a), 2.48 * math.sin(a), 0.0) for a in (math.tau * k / 6 for k in range(6))),
)
WATER = atoms(("O", 0.0, 0.0, 0.0), ("H", 0.96, 0.0, 0.0), ("H", -0.24, 0.93, 0.0))


def test_stability_counts_atoms_and_molecules():
    """In benzene with bonds of 1.40 angstrom each is a single one for EDM: no carbon has a valence of four."""
    ion = Atoms(WATER.positions[:2], WATER.elements[:2])
    empty = Atoms(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert stability([WATER, WATER, ion, BENZENE, empty]) == pytest.approx(
        {
            "n": 5,
            "atoms": 20 / 5,
            "atom_stable": (3 + 3 + 1 + 6) / 20,
            "molecule_stable": 2 / 5,
            "valid": 4 / 5,  # as radicals
            "unique": 3 / 4,
        }
    )


def test_molecule_of_atoms_is_what_rdkit_reads():
    ethyne = atoms(("H", -1.66, 0.0, 0.0), ("C", -0.6, 0.0, 0.0), ("C", 0.6, 0.0, 0.0), ("H", 1.66, 0.0, 0.0))
    assert to_smiles(to_molecule(ethyne)) == "C#C"
    assert to_smiles(to_molecule(WATER)) == "O"
    apart = Atoms(torch.cat([WATER.positions, WATER.positions + 5]), WATER.elements.repeat(2))
    assert to_molecule(apart) is None
    crowded = atoms(("F", 0.0, 0.0, 0.0), ("F", 1.42, 0.0, 0.0), ("F", -1.42, 0.0, 0.0))
    assert to_molecule(crowded) is None  # a fluorine of two bonds
