"""The scores of MOSES (Polykovskiy et al. 2020, section 4): of SMILES against its training set and its test set."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.io.extras import extra
from ldm.io.molecules import canonical_smiles, facts_of, is_molecule, quiet_rdkit, read_molecule
from ldm.metrics.distribution import frechet

BITS, RADIUS = 1024, 2  # of the Morgan fingerprints
BLOCK = 4096  # fingerprints compared at once
ELEMENTS = frozenset({"C", "N", "S", "O", "F", "Cl", "Br", "H"})  # of MOSES's molecules
LARGEST_RING = 7  # atoms


@dataclass(frozen=True)
class Reference:
    """What molecules are compared with.

    training: canonical SMILES that are not novel.  patterns: SMARTS that no molecule should have.
    test: mu, sigma and fingerprints of `ldm.io.molsets.reference_statistics`.
    """

    training: Collection[str]
    patterns: Sequence[str]
    test: Mapping[str, Tensor]


def molecule_scores(smiles: Sequence[str], reference: Reference, uniqueness: Sequence[int] = (1000, 10_000)) -> dict:
    """Compute MOSES's scores of generated SMILES, valid or not, in the order in which they were generated.

    n, n_valid: the molecules of `valid` and of all others.  valid: their fraction; 1 by construction for SELFIES.
    unique@K: for each K up to n_valid, of the first K valid ones.  novelty: of the distinct ones.  fcd: to the test
    set, which falls as 1 / n_valid: compare at equal n.  snn: mean similarity to the nearest of the test set.
    diversity: MOSES's IntDiv.  filters: the fraction that passes.  atoms: mean number of heavy atoms.
    """
    valid = [text for text in map(canonical_smiles, smiles) if text is not None]
    scores: dict[str, Any] = {"n": len(smiles), "n_valid": len(valid), "valid": len(valid) / max(1, len(smiles))}
    if len(valid) < 2:
        return scores
    bits = fingerprints(valid)
    mols = [read_molecule(text) for text in valid]
    return {
        **scores,
        **{f"unique@{k}": unique(valid[:k]) for k in uniqueness if k <= len(valid)},
        "novelty": novelty(valid, reference.training),
        "fcd": chemnet_distance(valid, reference.test["mu"], reference.test["sigma"]),
        "snn": float(nearest_similarity(bits, reference.test["fingerprints"]).mean()),
        "diversity": internal_diversity(bits),
        "filters": sum(map(Filters(reference.patterns).passes, mols)) / len(mols),
        "atoms": sum(mol.GetNumHeavyAtoms() for mol in mols) / len(mols),
    }


def unique(canonical: Sequence[str]) -> float:
    """Return the fraction of canonical SMILES that are distinct."""
    return len(set(canonical)) / len(canonical)


def novelty(canonical: Sequence[str], training: Collection[str]) -> float:
    """Return the fraction of the distinct canonical SMILES that are not in the training set."""
    distinct = set(canonical)
    return sum(text not in training for text in distinct) / len(distinct)


def fingerprints(smiles: Sequence[str]) -> Tensor:
    """Return the Morgan fingerprints of molecules (Rogers & Hahn 2010), packed: (N, BITS / 8) uint8."""
    with extra("molecules", "fingerprints"):
        from rdkit.Chem import rdFingerprintGenerator
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    bits = [generator.GetFingerprintAsNumPy(read_molecule(text)) for text in smiles]
    return torch.from_numpy(np.packbits(np.stack(bits), axis=1))


def unpack(bits: Tensor) -> Tensor:
    """Return packed fingerprints (N, BITS / 8) uint8 as (N, BITS) float32."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1)).float()


def tanimoto(a: Tensor, b: Tensor) -> Tensor:
    """Return the Tanimoto similarities (N, M) of fingerprints (N, BITS) and (M, BITS), zeros and ones.

    It is the number of common bits divided by that of all bits; 1 for two empty fingerprints.
    """
    common = a @ b.T
    either = a.sum(1, keepdim=True) + b.sum(1) - common
    return torch.where(either > 0, common / either, 1.0)


def similarity_blocks(bits: Tensor, reference: Tensor) -> Iterator[Tensor]:
    """Yield the similarities (N, m) of packed fingerprints to blocks of those of a reference."""
    rows = unpack(bits)
    for block in reference.split(BLOCK):
        yield tanimoto(rows, unpack(block))


def nearest_similarity(bits: Tensor, reference: Tensor) -> Tensor:
    """Return the similarity (N,) of each packed fingerprint to its nearest in the reference."""
    nearest = torch.zeros(len(bits))
    for block in similarity_blocks(bits, reference):
        nearest = torch.maximum(nearest, block.amax(1))
    return nearest


def internal_diversity(bits: Tensor) -> float:
    """Return 1 - the mean similarity of all pairs of packed fingerprints, each with itself too, as MOSES has it."""
    total = sum(float(block.double().sum()) for block in similarity_blocks(bits, bits))
    return 1 - total / len(bits) ** 2


def chemnet_distance(smiles: Sequence[str], mu: Tensor, sigma: Tensor) -> float:
    """Return the Frechet ChemNet distance (Preuer et al. 2018) of canonical SMILES to a mean and a covariance.

    Its expectation is above 0 by about 1,200 / N also for molecules of the reference's own distribution.
    """
    features = chemnet_features(smiles).double()
    return float(frechet(features.mean(0), features.T.cov(), mu, sigma))


def chemnet_features(smiles: Sequence[str], batch_size: int = 128) -> Tensor:
    """Return ChemNet's features (N, 512) float32 of canonical SMILES."""
    with extra("molecules", "fcd"):
        from fcd.utils import SmilesDataset
    network = _chemnet()
    rows = SmilesDataset(list(smiles))
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = np.stack([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        with torch.inference_mode():
            parts.append(network(torch.from_numpy(batch).transpose(1, 2).float()))
    return torch.cat(parts)


@lru_cache(1)
def _chemnet() -> torch.nn.Module:
    with extra("molecules", "fcd"):
        from fcd import load_ref_model
    return load_ref_model().requires_grad_(False)


class Filters:
    """MOSES's filters: no charges, no ring of eight or more atoms, only ELEMENTS, and none of the patterns."""

    def __init__(self, patterns: Sequence[str]):
        with quiet_rdkit():
            from rdkit import Chem

            self.patterns = [Chem.MolFromSmarts(pattern) for pattern in patterns]

    def passes(self, mol: Any) -> bool:
        """Return whether a molecule passes."""
        from rdkit import Chem

        if any(len(ring) > LARGEST_RING for ring in mol.GetRingInfo().AtomRings()):
            return False
        if any(atom.GetFormalCharge() or atom.GetSymbol() not in ELEMENTS for atom in mol.GetAtoms()):
            return False
        complete = Chem.AddHs(mol)
        return not any(complete.HasSubstructMatch(pattern) for pattern in self.patterns)


def fact_scores(smiles: Sequence[str], target: Tensor) -> dict[str, float]:
    """Compare the facts of generated molecules with those that were the condition, target (N, F) in the order of NAMES.

    logp_error: mean absolute difference.  logp_correlation.  rings_right, aromatic_right: fraction equal.
    elements_right: fraction in which all of F, Cl, Br and S are there or not there, as in the condition.
    Texts that are no molecule have no logP, and are wrong in all else.  The correlation of fewer than two
    molecules is NaN.
    """
    rows = [row for row, text in enumerate(smiles) if is_molecule(text)]
    facts = torch.tensor([facts_of(read_molecule(smiles[row])) for row in rows]).reshape(len(rows), target.shape[1])
    wish = target[rows]
    logp, equal = torch.stack([facts[:, 0], wish[:, 0]]), facts[:, 1:] == wish[:, 1:]
    return {
        "logp_error": float((logp[0] - logp[1]).abs().mean()),
        "logp_correlation": float(logp.corrcoef()[0, 1]) if len(rows) > 1 else float("nan"),
        "rings_right": float(equal[:, 0].sum()) / len(smiles),
        "aromatic_right": float(equal[:, 1].sum()) / len(smiles),
        "elements_right": float(equal[:, 2:].all(1).sum()) / len(smiles),
    }
