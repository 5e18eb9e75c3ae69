import csv
import hashlib

import pytest
import torch

from ldm.data import qm9
from ldm.data.qm9 import QM9
from ldm.errors import UserError
from ldm.io.atoms import from_sample

COLUMNS = ("Index", "Elements", "XYZ_Ang")


def row(index: int, elements: str = "['O','H','H']", positions: str | None = None) -> tuple:
    return index, elements, positions or f"[[0.{index:02d}1,5.0,0.4],[0.76,5.0,-0.2],[-0.76,5.0,-0.2]]"


BAD = (
    row(90, "['O','H']"),  # another number
    row(91, "['Xe','H','H']"),
    row(92, positions="[[0.0,0.0,1.5*^-5],[0.76,0.0,0.0],[0.0,0.0,0.0]]"),  # as some of the original files have it
    row(93, positions="[[0.0,0.0,99.0],[0.76,0.0,0.0],[0.0,0.0,0.0]]"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A stand-in for the package, 40 molecules and 4 that cannot be used, in three files."""
    folder = tmp_path_factory.mktemp("qm9")
    rows = [*(row(i) for i in range(1, 41)), *BAD]
    for part, name in enumerate(qm9.FILES):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows[part::3]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDM_CACHE", str(folder / "cache"))
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in qm9.FILES}
        patch.setattr(qm9, "FILES", hashes)
        yield folder


def test_qm9_splits_all_readable_molecules(source):
    train, test = QM9(root=source), QM9("test", source)
    assert len(train) + len(test) == 40
    assert 0 < len(test) < 12
    assert train.rejected == {
        "as many coordinates as elements were expected": 1,
        "elements or coordinates that cannot be read": 2,
        "3 atoms: expected 1 to 29, within 8 angstrom of their mean on each axis": 1,
    }
    both = torch.cat([train.images, test.images])
    assert len(both.unique(dim=0)) == 40
    assert len(QM9(num=3)) == 3
    atoms = from_sample(train.pixels([0])[0])
    assert atoms.elements.tolist() == [3, 0, 0]
    assert float(atoms.positions[:, 1].abs().max()) < 1e-6  # centred


def test_qm9_rotations_are_keyed_and_keep_distances(source):
    data = QM9(root=source, seed=3)
    samples = [(0, 5), (1, 5), (0, 6)]
    image = data.batch(samples)["image"]
    assert torch.equal(image[:1], data.batch(samples[:1])["image"])
    assert not torch.allclose(image[0], image[1])
    plain = data.pixels([5, 5, 6])
    assert torch.equal(image[:, 3:], plain[:, 3:])
    for i in range(3):
        torch.testing.assert_close(image[i, :3], data.rotation(*samples[i]) @ plain[i, :3])
    torch.testing.assert_close(image[:, :3].norm(dim=1), plain[:, :3].norm(dim=1))
    assert torch.equal(QM9(root=source, rotate=False).batch(samples)["image"], plain)
    assert not torch.allclose(QM9(root=source, seed=4).batch(samples)["image"], image)


def test_qm9_bad_option_is_one_line(source):
    with pytest.raises(UserError, match="split='all': expected train or test"):
        QM9("all")
    with pytest.raises(UserError, match="num=0: expected one molecule or more, or null for all"):
        QM9(num=0)
