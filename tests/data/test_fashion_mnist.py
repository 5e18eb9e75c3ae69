import gzip
import json

import pytest
import torch

from ldm.data import fashion_mnist
from ldm.data.fashion_mnist import FashionMNIST, read_idx


def idx(array: torch.Tensor) -> bytes:
    shape = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return gzip.compress(b"\0\0\x08" + bytes([array.ndim]) + shape + array.numpy().tobytes())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A stand-in for the downloaded folder: 20 + 10 images in the published format."""
    for name, num in (("train", 20), ("t10k", 10)):
        images = torch.randint(1, 256, (num, 28, 28), generator=torch.Generator().manual_seed(num), dtype=torch.uint8)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(torch.arange(num, dtype=torch.uint8) % 10))
    monkeypatch.setattr(fashion_mnist, "fashion_mnist", lambda root: tmp_path)
    return tmp_path


def test_fashion_mnist_reads_and_pads_both_splits(folder):
    train, test = FashionMNIST(), FashionMNIST("test", size=40)
    assert train.images.shape == (20, 1, 32, 32)
    assert test.images.shape == (10, 1, 40, 40)
    assert train.labels.tolist() == [*range(10)] * 2
    assert torch.equal(train.images[:, 0, 2:-2, 2:-2], read_idx(folder / "train-images-idx3-ubyte.gz"))
    wide = FashionMNIST(size=[28, 40])
    assert wide.shape == (1, 28, 40)
    assert torch.equal(wide.images[..., 6:-6], train.images[:, :, 2:-2, 2:-2])
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (train[3]["image"][0, border] == -1).all()
    assert train.shape == (1, 32, 32)
    assert train.fingerprint != test.fingerprint


def test_fashion_mnist_captions_are_unique_to_class(folder):
    data = FashionMNIST()
    assert data.classes[0] == "t-shirt"
    assert data.classes[-1] == "ankle boot"
    assert len(data.classes) == 10
    texts = [t for some in data.captions for t in some]
    assert len({t.lower() for t in texts}) == len(texts), "a caption belongs to one class only"
    assert all(t == t.strip() != "" for t in texts)


def test_fashion_mnist_captions_from_file(folder, tmp_path):
    (tmp_path / "bare.json").write_text(json.dumps({c: [c] for c in FashionMNIST().classes}))
    assert FashionMNIST(captions=tmp_path / "bare.json")[9]["caption"] == "ankle boot"


def test_fashion_mnist_rejects_invalid_options_and_files(folder):
    with pytest.raises(ValueError, match="split='val': expected one of train, test"):
        FashionMNIST("val")
    for size in (24, 33):
        with pytest.raises(ValueError, match=f"size={size}"):
            FashionMNIST(size=size)
    for content in (b"", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\x01a"):
        (folder / "bad.gz").write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match="not an IDX file of bytes"):
            read_idx(folder / "bad.gz")


@pytest.mark.slow
def test_fashion_mnist_real_data():
    train, test = FashionMNIST(), FashionMNIST("test")
    assert train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert torch.equal(train.labels.bincount(), torch.full((10,), 6000))
    assert torch.equal(test.labels.bincount(), torch.full((10,), 1000))
    assert train.images[..., 2:-2, 2:-2].float().mean().item() == pytest.approx(
        72.94, abs=0.01
    )  # 0.2860 of 255, as published everywhere
