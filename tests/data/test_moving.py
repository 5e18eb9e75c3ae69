import gzip

import pytest
import torch
from torch.nn import functional as F

from ldm.data import fashion_mnist, moving
from ldm.data.moving import CLASSES, MOTIONS, STILL, MovingGarments, paste, shows, track
from ldm.errors import ConfigError


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A stand-in for Fashion-MNIST: a random garment of each class in each split."""
    generator = torch.Generator().manual_seed(0)
    for name in ("train", "t10k"):
        images = torch.randint(0, 256, (10, 28, 28), generator=generator, dtype=torch.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", torch.arange(10, dtype=torch.uint8))):
            head = b"\0\0\x08" + bytes([array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.numpy().tobytes()))
    monkeypatch.setattr(fashion_mnist, "fashion_mnist", lambda root: tmp_path)


def test_moving_goes_where_its_caption_says():
    """In the first half every step is the speed in the caption's direction, and stays inside the picture throughout."""
    data = MovingGarments(pairs="all", frames=9)
    batch = data.batch([(epoch, i) for epoch in range(40) for i in range(len(data))])
    step = batch["track"].diff(dim=1)
    first = step[:, :4]  # of 8 steps
    assert (first - first[:, :1]).abs().max() < 1e-5
    assert torch.allclose(first.norm(dim=2).mean(1), batch["speed"], atol=1e-5)
    assert set(batch["motion"].tolist()) == set(range(9))
    for caption, label, motion, (down, right) in zip(
        batch["caption"], batch["label"].tolist(), batch["motion"].tolist(), first[:, 0].tolist(), strict=True
    ):
        words = {"down": down > 1e-3, "up": down < -1e-3, "right": right > 1e-3, "left": right < -1e-3}
        assert {word for word, true in words.items() if true} == {w for w in caption.split() if w in words}
        assert caption.removeprefix("an ").removeprefix("a ").startswith(CLASSES[label])
        assert ("moving" in caption) == (motion != STILL) == (MOTIONS[motion] != "standing still")
    speeds = batch["speed"][batch["motion"] != STILL]
    assert 1 <= speeds.min() < 1.2
    assert 2.8 < speeds.max() <= 3
    assert 0 <= batch["track"].min() < 0.3
    assert 17.7 < batch["track"].max() <= 18
    assert (step[:, 4:] - step[:, :1]).abs().amax((1, 2)).gt(0.5).any()  # some are reflected


def test_moving_draws_the_sprite_at_its_track():
    """At whole positions it is a copy, between them its centre and total are exact, in float64."""
    sprite = torch.rand(2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([[[3.0, 4.0], [2.25, 6.5]], [[0.0, 7.0], [7.0, 0.125]]], dtype=torch.float64)
    drawn = paste(sprite, at, 12)
    assert torch.equal(drawn[0, 0], F.pad(sprite[0], (4, 3, 3, 4)))
    assert torch.equal(drawn[1, 0], F.pad(sprite[1], (7, 0, 0, 7)))
    assert torch.allclose(drawn.sum((2, 3)), sprite.sum((1, 2))[:, None].expand(2, 2))
    whole, part = torch.arange(12).double(), torch.arange(5).double()
    rows = (drawn.sum(3) @ whole) / drawn.sum((2, 3)) - (sprite.sum(2) @ part / sprite.sum((1, 2)))[:, None]
    columns = (drawn.sum(2) @ whole) / drawn.sum((2, 3)) - (sprite.sum(1) @ part / sprite.sum((1, 2)))[:, None]
    assert torch.allclose(torch.stack([rows, columns], -1), at)


def test_moving_track_is_reflected():
    there = track(torch.tensor([[0.0, 2.0], [-3.0, 0.0]]), torch.tensor([[0.5, 0.0], [0.999999, 0.0]]), 8, 10)
    assert there[0, :, 1].tolist() == [0, 2, 4, 6, 8, 10, 8, 6]
    assert torch.allclose(there[1, :, 0], torch.tensor([10.0, 7, 4, 1, 2, 5, 8, 9]), atol=1e-4)


def test_moving_holds_out_nine_pairs():
    for pairs in ("seen", "held_out", "all"):
        data = MovingGarments(pairs=pairs)
        batch = data.batch_metadata([(e, i) for e in range(60) for i in range(len(data))])
        found = set(zip(batch["label"].tolist(), batch["motion"].tolist(), strict=True))
        expected = {
            (k, m)
            for k in range(10)
            for m in range(9)
            if pairs == "all" or ((k + m) % 10 == 3) == (pairs == "held_out")
        }
        assert found == expected
        assert len(expected) == {"seen": 81, "held_out": 9, "all": 90}[pairs]
        assert set(batch["caption"]) == set(data.all_captions())
        assert len(data.all_captions()) == len(expected)
        assert all(shows(k, m, pairs) for k, m in expected)


def test_moving_clips_are_keyed():
    """A training clip depends on (seed, epoch, index) alone, a test clip on (seed, index)."""
    train, test = MovingGarments(), MovingGarments("test")
    one, both = train.batch([(3, 1)]), train.batch([(0, 4), (3, 1)])
    assert torch.equal(one["image"][0], both["image"][1])
    assert one["caption"][0] == both["caption"][1]
    assert not torch.equal(one["track"], train.batch([(4, 1)])["track"])
    assert torch.equal(test.batch([(0, 2)])["image"], test.batch([(5, 2)])["image"])
    assert not torch.equal(one["track"], MovingGarments(seed=1).batch([(3, 1)])["track"])
    assert torch.equal(train.pixels([4])[0], both["image"][0])
    assert train[4]["caption"] == both["caption"][0]
    assert one["image"].shape == (1, *train.shape) == (1, 1, 8, 32, 32)
    assert one["image"].min() == -1
    prints = {
        MovingGarments(**o).fingerprint for o in ({}, {"seed": 1}, {"split": "test"}, {"frames": 9}, {"pairs": "all"})
    }
    assert len(prints) == 5


@pytest.mark.parametrize("option", [{"pairs": "new"}, {"frames": 2}, {"size": 40}, {"frames": 20}])
def test_moving_refuses(option):
    with pytest.raises(ConfigError, match=f"{next(iter(option))}="):
        MovingGarments(**option)


def test_moving_makes_the_long_clips():
    batch = MovingGarments(frames=16, size=64).batch([(0, 0), (1, 2)])
    assert batch["image"].shape == (2, 1, 16, 64, 64)
    assert batch["track"].shape == (2, 16, 2)
    assert moving.shrink(torch.ones(1, 28, 28), 14).sub(1).abs().max() < 1e-6
