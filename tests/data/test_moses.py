import gzip

import pytest
import torch

from ldm.data import moses
from ldm.data.moses import Moses, evenly_spaced
from ldm.errors import UserError
from ldm.io.molecules import describe, read_molecule, to_tokens

GOOD = ("CCO", "c1ccccc1F", "CC(=O)Oc1ccccc1C(=O)O", "Clc1ccccc1Br", "CSC", "CCN(CC)CC", "C1CCOC1", "CC#N")
FILE = "SMILES\n{} and a name\n\nC.C\nC1CC(\nFI(F)F\nCN(=O)=O\n".format("\n".join(GOOD))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("molecules")
        patch.setenv("LDM_CACHE", str(folder / "cache"))
        (folder / "some.smi").write_text(FILE)
        yield folder


def make(cache, **options) -> Moses:
    return Moses(**{"path": cache / "some.smi", "test_fraction": 0.4, **options})


@pytest.mark.parametrize("representation", ["selfies", "smiles"])
def test_moses_batch_of_a_file(cache, representation):
    data, test = (make(cache, split=split, representation=representation) for split in ("train", "test"))
    assert sorted(data.smiles(range(len(data))) + test.smiles(range(len(test)))) == sorted(map(spelled(data), GOOD))
    assert 0 < len(test) < len(GOOD)  # by the text of each
    rows = [len(data) - 1, 0]
    batch = data.batch([(0, rows[0]), (7, rows[1])])
    assert batch["image"].shape == (2, *data.shape)
    assert torch.equal(to_tokens(batch["image"]), data.tokens(rows).long())
    assert batch["vector"].shape == (2, 7)
    assert batch["caption"] == [describe(facts) for facts in batch["vector"].tolist()]
    assert batch["label"].tolist() == [-1, -1]
    assert data.medium == "molecule"
    assert data.fingerprint != test.fingerprint


def spelled(data):
    """A SMILES as the representation writes it."""
    return lambda smiles: data.vocabulary.decode(data.vocabulary.encode(read_molecule(smiles)))


def test_moses_counts_what_it_leaves_out(cache):
    counts: dict[str, int] = {}
    for split in ("train", "test"):
        for reason, number in make(cache, split=split).rejected.items():
            counts[reason] = counts.get(reason, 0) + number
    assert counts == {
        "empty": 1,
        "more than one part": 1,
        "RDKit cannot read it": 1,
        "SELFIES has no string for it": 1,
        "the symbol [N+1] is not in the vocabulary": 1,
    }
    assert "left out: " in make(cache).summary


def test_moses_splits_are_its_own(cache, monkeypatch):
    for split, smiles in {"train": GOOD, "test": GOOD[:2], "test_scaffolds": GOOD[2:3]}.items():
        with gzip.open(cache / f"{split}.csv.gz", "wt") as file:
            file.write("SMILES,SPLIT\n" + "".join(f"{text},{split}\n" for text in smiles))
    monkeypatch.setattr(moses, "moses", lambda root: cache)
    train = Moses(num=3)
    assert train.smiles(range(3)) == [spelled(train)(GOOD[i]) for i in (0, 2, 5)]
    assert len(Moses()) == len(GOOD)
    assert [len(Moses(split)) for split in ("test", "test_scaffolds")] == [2, 1]
    assert train.rejected == {}


def test_evenly_spaced_takes_all_if_there_are_fewer():
    assert evenly_spaced("abc", 5) == ["a", "b", "c"]
    assert evenly_spaced("abcdef", 3) == ["a", "c", "e"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"representation": "inchi"}, "representation='inchi': expected one of selfies, smiles"),
        ({"split": "test_scaffolds"}, "split='test_scaffolds': expected one of train, test"),
        ({"num": 0}, "num=0 num_test=10000 test_fraction=0.4: expected one molecule or more"),
        ({"path": "missing.smi"}, "data.path=missing.smi: no such file; expected a text file with a SMILES per line"),
        ({"path": "binary.smi"}, "data.path=binary.smi: not a text file in UTF-8"),
        ({"path": "bad.smi"}, "bad.smi: no molecule for split=train; left out: 2 more than one part"),
    ],
)
def test_moses_bad_option_is_one_line(cache, options, message, monkeypatch):
    monkeypatch.chdir(cache)
    (cache / "binary.smi").write_bytes(b"\xff\xfe\x00C")
    (cache / "bad.smi").write_text("C.C\nCC.C\n")
    with pytest.raises(UserError) as caught:
        make(cache, **options, **({"test_fraction": 0.01} if options.get("path") == "bad.smi" else {}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
