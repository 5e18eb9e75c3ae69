"""What cannot be read: named exactly, left out or replaced alike on every rank and for any number of workers; too much
ends the run.
"""

import csv
import io
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.config.build import build_dataset
from ldm.data import check, lazy
from ldm.data.folder import ImageFolder
from ldm.data.shards import TarShardDataset
from ldm.data.standard_datasets import LSUN
from ldm.data.stream import BatchDataset, BatchStream
from ldm.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def picture(number: int, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), (5 * number, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    head = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + picture(0)[33:]


BAD = {
    "b_cut.jpg": picture(1, "jpeg")[:300],
    "d_empty.png": b"",
    "f_page.jpg": b"<!doctype html><html>not found</html>",
    "h_bomb.png": bomb(),
}


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Forty whole images, and one of each kind that is not."""
    root = tmp_path / "church_train"
    root.mkdir()
    for number in range(40):
        (root / f"{'abcdefghij'[number % 10]}{number:02d}.png").write_bytes(picture(number))
    for name, data in BAD.items():
        (root / name).write_bytes(data)
    (root / "z_gone.png").symlink_to(root / "nowhere.png")
    (root / "._a.png").write_bytes(b"hidden")
    return root


@pytest.fixture
def shards(pictures) -> Path:
    path = pictures.parent / "shards" / "x.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for file in sorted(pictures.iterdir()):
            if not file.is_symlink():
                tar.add(file, file.name)
    return path


def test_folder_lists_exactly_its_skipped_files(pictures):
    data = ImageFolder(pictures, size=16, channels=3, test_fraction=0)
    assert sorted(data.skipped) == [*sorted(BAD), "z_gone.png"]
    assert "megapixels" in data.skipped["h_bomb.png"] or "bomb" in data.skipped["h_bomb.png"]
    assert len(data) == 40
    assert "5 skipped" in data.summary
    with pytest.raises(
        UserError,
        match=r"5 of 45 images cannot be read, more than data\.max_unreadable=0\.1: "
        r"b_cut\.jpg, d_empty\.png, f_page\.jpg, \.\.\.",
    ):
        ImageFolder(pictures, size=16, channels=3, test_fraction=0, max_unreadable=0.1)


def test_check_writes_manifest(pictures, tmp_path, capsys):
    assert check.main([str(pictures), f"out={tmp_path}/made/m.csv"]) == 0
    assert "40 of 45 images can be read, 5 quarantined" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "made" / "m.csv").open()))
    faults = {Path(row["name"]).name: row["fault"] for row in rows if row["fault"]}
    assert sorted(faults) == [*sorted(BAD), "z_gone.png"]
    whole = next(row for row in rows if row["name"].endswith("a00.png"))
    assert (whole["width"], whole["height"], int(whole["size"])) == ("24", "24", len(picture(0)))
    assert len(whole["sha256"]) == 64
    for words, why in ((["nowhere"], "no such"), ([str(pictures), "bad=1"], "expected a path and at most out=")):
        with pytest.raises(UserError, match=why):
            check.main(words)


def test_quarantined_files_are_skipped_on_all_ranks(pictures):
    """Order, number and digest of what is left are one on all ranks; a mended file comes back."""
    root = pictures.parent
    before = LSUN(root, category="church", size=16)
    assert len(before) == 45
    check.check_dataset(str(root))
    data = LSUN(root, category="church", size=16)
    assert len(data) == 40
    assert "5 quarantined" in data.summary
    assert data.content == LSUN(root, category="church", size=16).content != before.content
    ranks = [[i for part in BatchStream(len(data), 8, 5, rank=r, world=2) for _, i in part.samples] for r in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(40))
    assert torch.isfinite(data.batch([(0, i) for i in range(40)])["image"]).all()
    assert data.unreadable == set()
    (pictures / "d_empty.png").write_bytes(picture(7))
    assert len(LSUN(root, category="church", size=16)) == 41


def test_check_covers_samples_of_shards(shards):
    looked = check.check_dataset(str(shards))
    assert sum(bool(one.fault) for one in looked) == 4
    assert len(TarShardDataset(shards, size=16, test_fraction=0)) == 40
    again = shutil.copy(shards, shards.with_name("y.tar"))
    assert len(TarShardDataset(again, size=16, test_fraction=0)) == 44, "another path was not checked"


def test_unchecked_damaged_samples_are_replaced_deterministically(shards):
    """The next that can be read stands for it: on two ranks and with two workers as in one process."""
    data = TarShardDataset(shards, size=16, test_fraction=0, flip=False)
    stream = BatchStream(len(data), 8, 6)
    alone = [BatchDataset(data)[part]["image"] for part in stream]
    for rank in range(2):
        fresh = TarShardDataset(shards, size=16, test_fraction=0, flip=False)
        half = [BatchDataset(fresh)[part]["image"] for part in BatchStream(len(data), 8, 6, rank=rank, world=2)]
        assert all(torch.equal(one, whole[4 * rank : 4 * rank + 4]) for one, whole in zip(half, alone, strict=True))
    fresh = TarShardDataset(shards, size=16, test_fraction=0, flip=False)
    worked = DataLoader(BatchDataset(fresh), sampler=stream, batch_size=None, num_workers=2)
    assert all(torch.equal(batch["image"], whole) for batch, whole in zip(worked, alone, strict=True))
    assert len(data.unreadable) == 4


def test_too_many_damaged_samples_end_the_run(shards, pictures, monkeypatch):
    monkeypatch.setattr(lazy, "MAX_CONSECUTIVE_FAILURES", 3)
    data = TarShardDataset(shards, size=16, test_fraction=0)
    with pytest.raises(
        UserError, match=rf"4 of 44 images could not be read so far, .*python -m ldm\.data\.check {shards}"
    ):
        data.batch([(0, i) for i in range(44)])
    monkeypatch.setattr(lazy, "MAX_QUARANTINED", 0.05)
    check.check_dataset(str(shards))
    with pytest.raises(UserError, match="4 of 44 images are quarantined, more than 5%"):
        TarShardDataset(shards, size=16, test_fraction=0)


EXPECTED = {
    "folder": r"path=.*: no such folder; expected images in it",
    "webdataset": r"path=.*: no such file; expected a tar",
    "imagenet": r"no such folder \(a folder for each class",
    "coco": r"no such folder \(the images\)",
    "lsun": r"no such folder \(written by LSUN's",
}


@pytest.mark.parametrize("option", EXPECTED)
def test_missing_data_folder_reports_expected_layout(option, tmp_path):
    from omegaconf import OmegaConf
    from smoke import ROOT

    node = OmegaConf.load(ROOT / "conf" / "data" / f"{option}.yaml")
    node.path = str(tmp_path / "nowhere")
    with pytest.raises(Exception, match=EXPECTED[option]) as error:
        build_dataset(OmegaConf.create({"data": node}))
    assert isinstance(error.value.__cause__, UserError)
    assert not os.path.exists(tmp_path / "nowhere")
