"""The library is a heavy extra: a stand-in with the parts of its interface that are used serves here."""

import io
import sys
import types

import pytest
import torch
from PIL import Image

from ldm.data import hugging_face
from ldm.data.hugging_face import HuggingFace
from ldm.errors import UserError


class ImageFeature:
    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    names = ("cat", "sea_lion")


class Table:
    """Rows and features as a table of `datasets` has them."""

    def __init__(self, rows, fingerprint="abc"):
        self.rows, self._fingerprint = rows, fingerprint
        self.features = {"image": ImageFeature(), "text": object(), "label": ClassLabel(), "number": object()}

    def cast_column(self, name, feature):
        assert name == "image"
        assert not feature.decode, "bytes, so that every file goes the same way"
        return self

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, at):
        return [row[at] for row in self.rows] if isinstance(at, str) else self.rows[at]


def row(i, path=None):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (i, 0, 0)).save(buffer, "png")
    cell = {"bytes": buffer.getvalue(), "path": None} if path is None else {"bytes": None, "path": str(path)}
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return {"image": cell, "text": [f"picture {i}", f"number  {i}"] if i % 2 else f"picture {i}", "label": i % 2, "number": i % 5}


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The library with one data set of 40 rows and a test split of three."""
    asked = []
    splits = {
        "train": Table([row(i, tmp_path / "7.png" if i == 7 else None) for i in range(40)]),
        "test": Table([row(i) for i in range(3)]),
    }

    def load_dataset(path, config):
        asked.append((path, config))
        if path != "some/thing":
            raise RuntimeError("not\nfound")
        return splits

    fake = types.SimpleNamespace(load_dataset=load_dataset, load_from_disk=lambda folder: Table([row(i) for i in range(4)], folder))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return asked


def test_rows_are_samples(library):
    data = HuggingFace("some/thing", size=16, held_out=0.0, config="small")
    assert library == [("some/thing", "small")]
    batch = data.batch([(0, 7), (2, 12)])
    assert ((batch["image"][:, 0].mean((1, 2)) + 1) * 127.5).round().tolist() == [7, 12]
    assert batch["caption"][1] == "picture 12"
    assert {data.caption(place, 7) for place in range(20)} == {"picture 7", "number 7"}
    assert data.classes == ["image"]
    assert torch.equal(data.batch([(2, 12)])["image"], batch["image"][1:])


def test_labels_and_their_names(library):
    data = HuggingFace("some/thing", size=16, held_out=0.0, caption=None, label="label")
    assert data.about([(0, 3), (0, 4)])["label"].tolist() == [1, 0]
    assert data.classes == ["cat", "sea_lion"]
    assert "sea lion" in data.caption(0, 3)
    assert HuggingFace("some/thing", size=16, caption=None, label="number").classes == ["0", "1", "2", "3", "4"]


def test_splits(library):
    train, test = (HuggingFace("some/thing", split, size=16, held_out=0.3) for split in ("train", "test"))
    assert len(train) + len(test) == 40
    assert not set(train.rows.tolist()) & set(test.rows.tolist())
    assert len(HuggingFace("some/thing", size=16, test="test")) == 40
    assert len(HuggingFace("some/thing", "test", size=16, test="test")) == 3


def test_a_saved_one(library, tmp_path):
    (tmp_path / "dataset_info.json").touch()
    assert len(HuggingFace(str(tmp_path), size=16, held_out=0.0)) == 4
    assert not library


def test_mistakes_are_one_line(library, monkeypatch):
    for options, said in (
        ({"path": "other"}, "path=other: not found"),
        ({"path": "some/thing", "train": "x"}, "no split 'x'; it has train, test"),
        ({"path": "some/thing", "caption": "words"}, "no column 'words'; it has image, text, label, number"),
    ):
        with pytest.raises(UserError, match=said) as error:
            HuggingFace(**options)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[data\]'"):
        hugging_face.load("some/thing", None, "train")
