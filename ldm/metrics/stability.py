"""The stability of molecules in space (EDM: Hoogeboom et al. 2022, section 5 and app.): valences from bond lengths."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.io.atoms import ELEMENTS, Atoms
from ldm.io.molecules import quiet_rdkit, to_smiles

# bond lengths in picometres, by elements in alphabetical order; bonds of order 1, 2 and 3, as in a Kekulé structure
LENGTHS: tuple[dict[str, int], ...] = (
    {
        **{"HH": 74, "CH": 109, "HN": 101, "HO": 96, "FH": 92, "CC": 154, "CN": 147, "CO": 143, "CF": 135},
        **{"NN": 145, "NO": 140, "FN": 136, "OO": 148, "FO": 142, "FF": 142},
    },
    {"CC": 134, "CN": 129, "CO": 120, "NN": 125, "NO": 121, "OO": 121},
    {"CC": 120, "CN": 116, "CO": 113, "NN": 110},
)
MARGINS = (10, 5, 3)  # picometres, above the length, for each order
VALENCES = {"H": 1, "C": 4, "N": 3, "O": 2, "F": 1}


def _limits() -> Tensor:
    """Return the distance (3, K, K) in angstrom below which two elements have a bond of order 1, 2, 3."""
    table = torch.zeros(len(LENGTHS), len(ELEMENTS), len(ELEMENTS))
    for order, (lengths, margin) in enumerate(zip(LENGTHS, MARGINS, strict=True)):
        for pair, length in lengths.items():
            i, j = (ELEMENTS.index(name) for name in pair)
            table[order, i, j] = table[order, j, i] = (length + margin) / 100
    return table


LIMITS = _limits()


def bond_orders(atoms: Atoms) -> Tensor:
    """Return the orders (n, n) int64 of the bonds between atoms, 0 for none.

    A bond has an order only if it is short enough for all lower ones.  Orders are integers: an aromatic ring is counted
    by its lengths, never as 1.5, which an integer would cut to 1.
    """
    distance = torch.cdist(atoms.positions.double(), atoms.positions.double())
    distance.fill_diagonal_(torch.inf)
    below = distance < LIMITS[:, atoms.elements][:, :, atoms.elements]  # (3, n, n)
    return below.long().cumprod(0).sum(0)


def stability(molecules: Sequence[Atoms]) -> dict[str, float]:
    """Return `atom_stable`, the fraction of atoms with their VALENCES, and `molecule_stable`, with all atoms stable.

    A molecule without atoms is not stable.  n, atoms: the numbers of molecules, and of atoms on average.
    valid: the fraction that RDKit can read, in one part; unique: of these, the fraction that is distinct.
    """
    valences = torch.tensor([VALENCES[name] for name in ELEMENTS])
    stable = [bond_orders(atoms).sum(1) == valences[atoms.elements] for atoms in molecules]
    total = sum(map(len, stable))
    smiles = [to_smiles(mol) for atoms in molecules if (mol := to_molecule(atoms)) is not None]
    return {
        "n": len(molecules),
        "atoms": total / len(molecules),
        "atom_stable": sum(int(rows.sum()) for rows in stable) / max(1, total),
        "molecule_stable": sum(bool(len(rows)) and bool(rows.all()) for rows in stable) / len(molecules),
        "valid": len(smiles) / len(molecules),
        "unique": len(set(smiles)) / max(1, len(smiles)),
    }


def to_molecule(atoms: Atoms) -> Any:
    """Return the RDKit molecule of atoms with their `bond_orders`; None if it is none, or of more than one part."""
    with quiet_rdkit():
        from rdkit import Chem

        editable = Chem.RWMol()
        for element in atoms.elements.tolist():
            atom = Chem.Atom(ELEMENTS[element])
            atom.SetNoImplicit(True)
            editable.AddAtom(atom)
        orders, names = bond_orders(atoms), (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
        for i, j in orders.triu().nonzero().tolist():
            editable.AddBond(i, j, names[int(orders[i, j]) - 1])
        mol = editable.GetMol()
        sane = Chem.SanitizeMol(mol, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE
        return Chem.RemoveHs(mol) if sane and len(Chem.GetMolFrags(mol)) == 1 else None
