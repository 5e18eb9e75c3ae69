import numpy as np
import pytest
import torch

from ldm.io.molecules import canonical_smiles, facts_of, read_molecule
from ldm.metrics import molecules
from ldm.metrics.molecules import (
    Filters,
    Reference,
    chemnet_distance,
    fact_scores,
    fingerprints,
    internal_diversity,
    molecule_scores,
    nearest_similarity,
    tanimoto,
    unpack,
)

DRUGS = tuple(
    map(canonical_smiles, ("CC(=O)Oc1ccccc1C(=O)O", "CC(C)Cc1ccc(C(C)C(=O)O)cc1", "CCN(CC)CC", "Fc1ccc(Cl)cc1", "CCO"))
)


def similarity(a: str, b: str) -> float:
    """RDKit's own Tanimoto similarity of Morgan fingerprints of radius 2."""
    from rdkit import DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024)
    return DataStructs.TanimotoSimilarity(*(generator.GetFingerprint(read_molecule(text)) for text in (a, b)))


def test_similarities_are_those_of_rdkit(monkeypatch):
    monkeypatch.setattr(molecules, "BLOCK", 2)
    bits = fingerprints(DRUGS)
    expected = torch.tensor([[similarity(a, b) for b in DRUGS] for a in DRUGS])
    torch.testing.assert_close(tanimoto(unpack(bits), unpack(bits)), expected)
    nearest = nearest_similarity(bits[:2], bits[2:])
    torch.testing.assert_close(nearest, expected[:2, 2:].amax(1))
    assert internal_diversity(bits) == pytest.approx(1 - float(expected.mean()), abs=1e-6)


def test_empty_fingerprints_are_equal():
    """RDKit has 0.0 there, by which copies of one molecule could be diverse."""
    assert tanimoto(torch.zeros(1, 8), torch.tensor([[0.0] * 8, [1.0] * 8])).tolist() == [[1, 0]]


def test_chemnet_distance_is_that_of_fcd():
    from fcd import calculate_frechet_distance, get_predictions, load_ref_model

    x, y = (np.float64(get_predictions(load_ref_model(), list(part), n_jobs=0)) for part in (DRUGS[:3], DRUGS[1:]))
    mu, sigma = y.mean(0), np.cov(y.T) + np.eye(512)
    expected = calculate_frechet_distance(x.mean(0), np.cov(x.T), mu, sigma)
    found = chemnet_distance(DRUGS[:3], torch.from_numpy(mu), torch.from_numpy(sigma))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("smiles", "passes"),
    [
        ("CCO", True),
        ("C1CCCCCC1", True),
        ("C1CCCCCCC1", False),  # a ring of eight
        ("CC[NH3+]", False),  # a charge
        ("CCP", False),  # another element
        ("CC#N", False),  # the pattern
        ("CCCl", False),  # the pattern with a hydrogen
    ],
)
def test_filters(smiles, passes):
    assert Filters(["C#N", "[H]CCl"]).passes(read_molecule(smiles)) is passes


def test_molecule_scores_of_known_samples(monkeypatch):
    monkeypatch.setattr(molecules, "chemnet_distance", lambda smiles, mu, sigma: len(smiles) + mu + sigma)
    ethanol, nitrile = "OCC", "CC#N"
    reference = Reference({"CCO"}, ["C#N"], {"mu": 10, "sigma": 20, "fingerprints": fingerprints(["CCO", "CCC"])})
    scores = molecule_scores([ethanol, "C.C", ethanol, "", nitrile, "C1CC", "CCO"], reference, (2, 3, 5))
    assert scores == pytest.approx(
        {
            "n": 7,
            "n_valid": 4,
            "valid": 4 / 7,
            "unique@2": 0.5,
            "unique@3": 2 / 3,  # and not @5, of which there are too few
            "novelty": 0.5,
            "fcd": 34,
            "snn": (3 + max(similarity(nitrile, "CCO"), similarity(nitrile, "CCC"))) / 4,
            "diversity": 1 - (9 + 1 + 6 * similarity("CCO", nitrile)) / 16,
            "filters": 0.75,
            "atoms": 3,
        }
    )
    assert molecule_scores(["", "C.C"], reference) == {"n": 2, "n_valid": 0, "valid": 0}


def test_fact_scores_compare_with_condition():
    target = torch.tensor([facts_of(read_molecule(text)) for text in DRUGS])
    exact = fact_scores(DRUGS, target)
    assert exact == pytest.approx(
        {"logp_error": 0, "logp_correlation": 1, "rings_right": 1, "aromatic_right": 1, "elements_right": 1}, abs=1e-6
    )
    target[0, 0] += 0.5
    target[1, 1] += 1  # rings
    target[2, 4] = 1  # chlorine
    found = fact_scores([*DRUGS[:4], "C1CC"], target)
    assert found["logp_error"] == pytest.approx(0.5 / 4, abs=1e-6)
    assert 0.9 < found["logp_correlation"] < 1
    assert (found["rings_right"], found["aromatic_right"], found["elements_right"]) == (0.6, 0.8, 0.6)
    assert fact_scores(["", "C.C"], target[:2])["rings_right"] == 0
