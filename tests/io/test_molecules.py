import pytest
import torch

from ldm.errors import UserError
from ldm.io.molecules import (
    LENGTH,
    SELFIES,
    SMILES,
    RejectedMoleculeError,
    canonical_smiles,
    describe,
    encode_all,
    facts_of,
    is_molecule,
    read_molecule,
    samples_to_smiles,
    to_sample,
    to_tokens,
    vocabulary_of,
)

DRUGS = ("CC(=O)Oc1ccccc1C(=O)O", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "CC(C)Cc1ccc(C(C)C(=O)O)cc1", "O=C(Nc1ccc(Cl)cc1)C1CS1")


@pytest.mark.parametrize("vocabulary", [SELFIES, SMILES], ids=lambda v: v.name)
def test_tokens_and_samples_are_inverses(vocabulary):
    mols = [read_molecule(text) for text in DRUGS]
    tokens = torch.tensor([vocabulary.encode(mol) for mol in mols])
    sample = to_sample(tokens, vocabulary)
    assert sample.shape == (len(DRUGS), len(vocabulary.symbols), LENGTH)
    assert torch.equal(sample.sum(1), torch.full((len(DRUGS), LENGTH), 2.0 - len(vocabulary.symbols)))
    assert torch.equal(to_tokens(sample), tokens)
    assert [canonical_smiles(text) for text in samples_to_smiles(sample)] == [canonical_smiles(text) for text in DRUGS]


def test_tokens_are_those_of_the_symbols():
    """CC(=O)Cl: SELFIES has the length of a branch, 1, as the symbol of index 0, which is [C]."""
    acyl = read_molecule("CC(=O)Cl")
    symbols = [SELFIES.symbols[token] for token in SELFIES.encode(acyl)]
    assert symbols == ["[C]", "[C]", "[=Branch1]", "[C]", "[=O]", "[Cl]"] + ["[nop]"] * (LENGTH - 6)
    symbols = [SMILES.symbols[token] for token in SMILES.encode(acyl)]
    assert symbols == ["C", "C", "(", "=", "O", ")", "Cl"] + [""] * (LENGTH - 7)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" ", "empty"),
        ("C.C", "more than one part"),
        ("CCO C1CC(", "text after a space"),  # RDKit takes what follows for a name
        ("C1CC(", "RDKit cannot read it"),
        ("C(C)(C)(C)(C)C", "RDKit cannot read it"),
        ("FI(F)F", "SELFIES has no string for it"),
        ("CN(=O)=O", "the symbol [N+1] is not in the vocabulary"),  # rewritten by RDKit
        ("C" * (LENGTH + 1), f"longer than {LENGTH} symbols"),
    ],
)
def test_unusable_molecule_is_one_line(text, reason, capfd):
    with pytest.raises(RejectedMoleculeError) as caught:
        SELFIES.encode(read_molecule(text))
    assert caught.value.reason == reason
    assert str(caught.value).endswith(f": {reason}")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # RDKit prints what is wrong with a molecule
    tokens, facts, rejected = encode_all([text, "CCO"], SELFIES)
    assert (len(tokens), len(facts), rejected) == (1, 1, {reason: 1})


def test_strings_of_selfies_are_molecules_except_empty():
    """Every string of SELFIES is a molecule, but padding alone is none, which RDKit takes for one of no atoms."""
    tokens = torch.randint(1, len(SELFIES.symbols), (20, LENGTH), generator=torch.Generator().manual_seed(0))
    drawn = samples_to_smiles(to_sample(tokens, SELFIES))
    assert all(map(is_molecule, drawn))
    assert samples_to_smiles(to_sample(torch.zeros(1, LENGTH), SELFIES)) == [""]
    assert not is_molecule("")
    assert canonical_smiles("C1CC") is None


def test_facts_and_caption_of_a_molecule():
    """Aspirin's logP by Crippen's method is 1.31 (Wildman & Crippen 1999, as RDKit prints it)."""
    facts = facts_of(read_molecule(DRUGS[0]))
    assert facts[0] == pytest.approx(1.3101, abs=1e-4)
    assert facts[1:] == [1, 1, 0, 0, 0, 0]
    assert describe(facts) == "a molecule with one ring, one aromatic, logP about 1"
    assert facts_of(read_molecule("FC1CC1c1ccc(Br)s1"))[1:] == [2, 1, 1, 0, 1, 1]
    assert describe([-0.6, 0, 0, 0, 1, 0, 1]) == "a molecule with no rings, a chlorine, a sulfur, logP about -1"


def test_samples_of_another_shape_are_refused():
    with pytest.raises(UserError, match=r"\(3, 32, 32\) are no molecules; expected rows of 27 \(selfies\)"):
        vocabulary_of(torch.zeros(3, 32, 32))
