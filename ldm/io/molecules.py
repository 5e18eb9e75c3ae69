"""Molecules as strings of symbols, SELFIES or SMILES, and as one-hot samples (symbols, LENGTH); read with RDKit."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ldm.errors import ConfigError, UserError
from ldm.io.extras import extra

LENGTH = 56  # symbols of a sample; the strings of MOSES have up to 54 in SMILES and 55 in SELFIES
NAMES = ("logp", "rings", "aromatic_rings", "has_F", "has_Cl", "has_Br", "has_S")  # of the facts
ELEMENTS = {"F": "fluorine", "Cl": "chlorine", "Br": "bromine", "S": "sulfur"}
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
SMILES_SYMBOL = re.compile(r"\[[^\]]+\]|Br|Cl|%\d\d|.")


class RejectedMoleculeError(UserError):
    """A string that is no molecule that can be used; `reason` is one of a few, so that they can be counted."""

    def __init__(self, text: str, reason: str):
        super().__init__(f"{text[:80]!r}: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a representation, by which token i is symbols[i]; the first is padding and stands for nothing.

    They are those that occur in MOSES: [P], [N], ... also serve as the digits after Branch and Ring in SELFIES.
    """

    name: str
    symbols: tuple[str, ...]

    def encode(self, mol: Any) -> list[int]:
        """Return the LENGTH tokens of an RDKit molecule, by its canonical SMILES.

        Raises RejectedMoleculeError for a molecule that the representation refuses, that has other symbols, or is too
        long.
        """
        smiles = to_smiles(mol)
        symbols = SPLIT[self.name](smiles)
        index = {symbol: i for i, symbol in enumerate(self.symbols)}
        if unknown := [symbol for symbol in symbols if symbol not in index]:
            raise RejectedMoleculeError(smiles, f"the symbol {unknown[0]} is not in the vocabulary")
        if len(symbols) > LENGTH:
            raise RejectedMoleculeError(smiles, f"longer than {LENGTH} symbols")
        return [index[symbol] for symbol in symbols] + [0] * (LENGTH - len(symbols))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the SMILES that tokens stand for, as written, which need not be of a molecule; padding is left out."""
        return JOIN[self.name]("".join(self.symbols[token] for token in tokens if token))


SELFIES = Vocabulary(
    "selfies",
    (
        *("[nop]", "[C]", "[=C]", "[Ring1]", "[Branch1]", "[N]", "[=Branch1]", "[O]", "[=O]", "[Ring2]", "[=N]"),
        *("[Branch2]", "[S]", "[#Branch1]", "[#Branch2]", "[F]", "[=Branch2]", "[NH1]", "[=Ring1]", "[Cl]", "[#C]"),
        *("[P]", "[#N]", "[Br]", "[=S]", "[=Ring2]", "[H]"),
    ),
)
SMILES = Vocabulary(
    "smiles",
    (
        *("", "c", "C", "(", ")", "1", "O", "2", "N", "=", "n", "3", "F", "-", "S", "s", "o", "Cl", "[nH]", "#", "4"),
        *("Br", "5", "[H]", "6"),
    ),
)
VOCABULARIES = {vocabulary.name: vocabulary for vocabulary in (SELFIES, SMILES)}
BY_SIZE = {len(vocabulary.symbols): vocabulary for vocabulary in VOCABULARIES.values()}


def vocabulary_named(name: str) -> Vocabulary:
    """Return the vocabulary of a representation.  Raises ConfigError for an unknown one."""
    if name not in VOCABULARIES:
        raise ConfigError(f"representation={name!r}: expected one of {', '.join(VOCABULARIES)}")
    return VOCABULARIES[name]


def vocabulary_of(sample: Tensor) -> Vocabulary:
    """Return the vocabulary of samples (..., symbols, LENGTH): each has a number of symbols of its own.

    Raises UserError for samples of another shape.
    """
    if sample.ndim < 2 or sample.shape[-2] not in BY_SIZE:
        sizes = " or ".join(f"{size} ({vocabulary.name})" for size, vocabulary in BY_SIZE.items())
        raise UserError(f"samples of shape {tuple(sample.shape)} are no molecules; expected rows of {sizes} symbols")
    return BY_SIZE[sample.shape[-2]]


def to_sample(tokens: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return tokens (..., LENGTH) as a sample (..., symbols, LENGTH) float32: 1 for the symbol, -1 for all others."""
    return one_hot(tokens.long(), len(vocabulary.symbols)).movedim(-1, -2).float().mul_(2).sub_(1)


def to_tokens(sample: Tensor) -> Tensor:
    """Return the tokens (..., LENGTH) int64 of a sample (..., symbols, LENGTH): the symbol of the largest value."""
    return sample.argmax(-2)


def samples_to_smiles(samples: Tensor) -> list[str]:
    """Return the SMILES of samples (B, symbols, LENGTH), which need not be of molecules."""
    vocabulary = vocabulary_of(samples)
    return [vocabulary.decode(tokens) for tokens in to_tokens(samples).tolist()]


def selfies_symbols(smiles: str) -> list[str]:
    """Return the SELFIES symbols (Krenn et al. 2020) of a SMILES.  Raises RejectedMoleculeError if it has none."""
    with extra("molecules", "representation=selfies"):
        import selfies
    try:
        return list(selfies.split_selfies(selfies.encoder(smiles)))
    except selfies.EncoderError:
        raise RejectedMoleculeError(smiles, "SELFIES has no string for it") from None


def from_selfies(text: str) -> str:
    """Return the SMILES of a string of SELFIES symbols, which every one has."""
    with extra("molecules", "representation=selfies"):
        import selfies
    return selfies.decoder(text)


SPLIT: dict[str, Callable[[str], list[str]]] = {"selfies": selfies_symbols, "smiles": SMILES_SYMBOL.findall}
JOIN: dict[str, Callable[[str], str]] = {"selfies": from_selfies, "smiles": str}


@contextmanager
def quiet_rdkit() -> Iterator[None]:
    """Print nothing of what RDKit finds wrong with a molecule within the block."""
    with extra("molecules", "reading molecules"):
        from rdkit import rdBase
    with rdBase.BlockLogs():
        yield


def read_molecule(smiles: str) -> Any:
    """Return the RDKit molecule of a SMILES: of one part, with at least one atom.

    RDKit alone would take the empty text as a molecule of no atoms, "C.C" as one of two parts, and what follows a space
    as a name.
    Raises RejectedMoleculeError.
    """
    with quiet_rdkit():
        from rdkit import Chem

        if not smiles.strip():
            raise RejectedMoleculeError(smiles, "empty")
        if smiles != "".join(smiles.split()):
            raise RejectedMoleculeError(smiles, "text after a space")
        if "." in smiles:
            raise RejectedMoleculeError(smiles, "more than one part")
        mol = Chem.MolFromSmiles(smiles)
        if mol is None:
            raise RejectedMoleculeError(smiles, "RDKit cannot read it")
        return mol


def is_molecule(smiles: str) -> bool:
    """Return whether `read_molecule` takes a SMILES."""
    try:
        read_molecule(smiles)
    except RejectedMoleculeError:
        return False
    return True


def to_smiles(mol: Any) -> str:
    """Return RDKit's canonical SMILES of a molecule."""
    from rdkit import Chem

    return Chem.MolToSmiles(mol)


def canonical_smiles(smiles: str) -> str | None:
    """Return the canonical form of a SMILES, None if it is of no molecule."""
    try:
        return to_smiles(read_molecule(smiles))
    except RejectedMoleculeError:
        return None


def facts_of(mol: Any) -> list[float]:
    """Return the facts of a molecule, in the order of NAMES.

    Crippen's logP, the numbers of rings and of aromatic rings, and 1 or 0 for whether it has each of the ELEMENTS.
    """
    from rdkit.Chem import rdMolDescriptors

    elements = {atom.GetSymbol() for atom in mol.GetAtoms()}
    rings = rdMolDescriptors.CalcNumRings(mol), rdMolDescriptors.CalcNumAromaticRings(mol)
    logp, _ = rdMolDescriptors.CalcCrippenDescriptors(mol)
    return [logp, *map(float, rings), *(float(element in elements) for element in ELEMENTS)]


def describe(facts: Sequence[float]) -> str:
    """Return the caption of facts: "a molecule with two rings, one aromatic, a fluorine, logP about 3"."""
    logp, rings, aromatic = (round(value) for value in facts[:3])
    parts = [f"{number_word(rings)} ring{'s' * (rings != 1)}"]
    parts += [f"{number_word(aromatic)} aromatic"] if rings else []
    parts += [f"a {name}" for name, present in zip(ELEMENTS.values(), facts[3:], strict=True) if present]
    return f"a molecule with {', '.join(parts)}, logP about {logp}"


def number_word(number: int) -> str:
    """Return a small number as a word."""
    return COUNTS[number] if 0 <= number < len(COUNTS) else str(number)


def encode_all(
    smiles: Sequence[str], vocabulary: Vocabulary, progress: Callable[[int], None] = lambda done: None
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Encode many SMILES; those that cannot be used are left out and counted by reason.

    progress: called with the number of SMILES that are done.
    Returns tokens (N, LENGTH) uint8, facts (N, len(NAMES)) float32, and the counts.
    """
    tokens: list[list[int]] = []
    facts: list[list[float]] = []
    rejected: Counter[str] = Counter()
    for done, text in enumerate(smiles, 1):
        try:
            mol = read_molecule(text)
            tokens.append(vocabulary.encode(mol))
            facts.append(facts_of(mol))
        except RejectedMoleculeError as error:
            rejected[error.reason] += 1
        progress(done)
    return (
        torch.tensor(tokens, dtype=torch.uint8).reshape(-1, LENGTH),
        torch.tensor(facts).reshape(-1, len(NAMES)),
        dict(rejected),
    )
