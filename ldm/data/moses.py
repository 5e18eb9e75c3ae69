"""MOSES (Polykovskiy et al. 2020): drug-like molecules as one-hot strings of symbols, captioned by measured facts."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.image_cache import cached
from ldm.data.memory import InMemoryDataset
from ldm.errors import ConfigError, UserError
from ldm.io.atomic import file_sha256
from ldm.io.molecules import LENGTH, describe, encode_all, to_sample, vocabulary_named
from ldm.io.molsets import FILES, SPLITS, moses
from ldm.io.progress import ProgressBar
from ldm.tensors import derive_seed

READER = 1  # raise it when reading changes its result, so that cached tokens are not used


class Moses(InMemoryDataset):
    """Molecules of MOSES, or of a file: image (symbols, LENGTH) in {-1, 1}, the symbol of each position one-hot.

    A batch also has vector (B, F) float32, the facts (ldm.io.molecules.NAMES), which the captions put into words.
    split: train, test, or test_scaffolds, whose scaffolds are in neither of the others; of a file, train and test are
    divided by the text of the SMILES.
    root: a folder that may contain MOSES's files.  path: a text file instead, a SMILES and perhaps a name per line.
    representation: selfies, of which every string is a molecule, or smiles.
    num, num_test: molecules to take of MOSES's train and of the others, evenly spaced over the file.
    test_fraction: of the molecules of `path` in the test split.
    What RDKit or the representation refuses is left out and counted in `rejected`, by reason.
    Raises ConfigError for an invalid option, UserError without molecules, AssetNotFoundError without the files.
    """

    medium = "molecule"

    def __init__(
        self,
        split: str = "train",
        root: str | Path | None = None,
        path: str | Path | None = None,
        representation: str = "selfies",
        num: int = 300_000,
        num_test: int = 10_000,
        test_fraction: float = 0.1,
        seed: int = 0,
    ):
        self.vocabulary = vocabulary_named(representation)
        splits = SPLITS if path is None else SPLITS[:2]
        if split not in splits:
            raise ConfigError(f"split={split!r}: expected one of {', '.join(splits)}")
        if min(num, num_test) < 1 or not 0 < test_fraction < 1:
            raise ConfigError(
                f"num={num} num_test={num_test} test_fraction={test_fraction}: "
                "expected one molecule or more, and a fraction between 0 and 1"
            )
        most = num if split == "train" else num_test
        source = f"{split}.csv.gz" if path is None else str(path)
        content = FILES[source] if path is None else file_sha256(require_file(Path(path).expanduser()))

        def create() -> tuple[Tensor, dict[str, int]]:
            if path is None:
                smiles = evenly_spaced(read_moses(moses(root) / source), most)
            else:
                smiles = own_split(read_smiles(Path(path).expanduser()), split, test_fraction)
            bar = ProgressBar("molecules", len(smiles), unit="molecules")
            tokens, facts, rejected = encode_all(smiles, self.vocabulary, bar.update)
            return torch.cat([tokens, facts.view(torch.uint8)], 1), rejected

        options = (split, most) if path is None else (split, test_fraction)
        packed, self.rejected = cached("molecules", (READER, content, self.vocabulary, LENGTH, *options), create)
        if not len(packed):
            raise UserError(f"{source}: no molecule for split={split}; {count_text(self.rejected)}")
        tokens, self.facts = packed[:, :LENGTH].clone(), packed[:, LENGTH:].clone().view(torch.float32)
        texts: dict[str, list[str]] = {}
        captions = [texts.setdefault(text, [text]) for text in map(describe, self.facts.tolist())]
        super().__init__(f"moses-{representation}-{split}", tokens[:, None], seed=seed, texts=captions)
        self.shape = (len(self.vocabulary.symbols), LENGTH)
        self.summary = f"{len(self):,} molecules; {count_text(self.rejected)}"

    def pixels(self, index: Sequence[int] | Tensor) -> Tensor:
        """Return samples (B, symbols, LENGTH) float32 in {-1, 1}."""
        return to_sample(self.tokens(index), self.vocabulary)

    def tokens(self, index: Sequence[int] | Tensor) -> Tensor:
        """Return tokens (B, LENGTH) uint8."""
        return self.stored[torch.as_tensor(index, dtype=torch.long), 0]

    def smiles(self, index: Sequence[int] | Tensor) -> list[str]:
        """Return the SMILES of samples."""
        return [self.vocabulary.decode(tokens) for tokens in self.tokens(index).tolist()]

    @property
    def images(self) -> Tensor:
        """All samples (N, symbols, LENGTH) float32."""
        return self.pixels(range(len(self)))

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its images, with vector (B, F) float32; see InMemoryDataset."""
        metadata = super().batch_metadata(samples)
        return {**metadata, "vector": self.facts[torch.tensor(metadata["index"], dtype=torch.long)]}


def read_moses(path: Path) -> list[str]:
    """Return the SMILES of one of MOSES's csv files, in order."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        header, *lines = file.read().splitlines()
    if header.split(",")[0] != "SMILES":
        raise UserError(f"{path}: expected the column SMILES first")
    return [line.split(",")[0] for line in lines]


def read_smiles(path: Path) -> list[str]:
    """Return the first word of each line of a text file, "" for an empty line; a header `SMILES` is left out.

    Raises UserError for a file that is not text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"data.path={path}: not a text file in UTF-8; expected a SMILES per line") from None
    words = [(line.split() or [""])[0] for line in lines]
    return words[1:] if words and words[0].upper() == "SMILES" else words


def require_file(path: Path) -> Path:
    """Return the path of a file.  Raises UserError if there is none."""
    if not path.is_file():
        raise UserError(f"data.path={path}: no such file; expected a text file with a SMILES per line")
    return path


def evenly_spaced(items: Sequence[str], num: int) -> list[str]:
    """Return at most `num` of the items, evenly spaced, in order."""
    num = min(num, len(items))
    return [items[i * len(items) // num] for i in range(num)]


def own_split(smiles: Sequence[str], split: str, test_fraction: float) -> list[str]:
    """Return those SMILES that are in a split, each decided by its own text."""
    return [text for text in smiles if (derive_seed("held out", text) < test_fraction * 2**63) == (split == "test")]


def count_text(rejected: dict[str, int]) -> str:
    """Return counts by reason in words: "left out: 2 empty, 1 more than one part"."""
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(rejected.items()))
    return f"left out: {counts}" if counts else "none left out"
