import gzip
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import blue_marble
from ldm.data.blue_marble import MAP, BlueMarble, classes, kinds, tiles
from ldm.data.relief import to_bytes
from ldm.io.download import AssetNotFoundError

SEA, PLAIN, PEAK = (14, 133, 249), (51, 204, 102), (156, 113, 7)  # 4,500 m down, 100 m and 4,500 m up


@pytest.fixture
def earth(tmp_path, monkeypatch):
    """An Earth of a pixel a degree: sea in the west, a plain with a lake in the north-east, peaks in the south-east."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    folder = tmp_path / "earth"
    folder.mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (180, 360, 3), dtype=np.uint8)
    relief = np.empty((180, 360, 3), np.uint8)
    relief[:, :180], relief[:90, 180:], relief[90:, 180:] = SEA, PLAIN, PEAK
    mask = np.zeros(
        (2160, 4320), np.uint8
    )  # twelve of its pixels are one of the picture, its rows go from south to north
    mask[:, 2160:] = 1
    mask[1620:1800, 3000:3120] = 2
    Image.fromarray(picture).save(folder / "bmng.jpg", quality=100, subsampling=0)
    Image.fromarray(relief).save(folder / "etopo1.jpg", quality=100, subsampling=0)
    (folder / "lsmask_5min_f.bin").write_bytes(gzip.compress(mask.tobytes(), 1))
    monkeypatch.setattr(
        blue_marble, "FILES", {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    )
    return folder


def test_blue_marble_planes_are_aligned(earth):
    planes = blue_marble.read(earth)
    assert planes.shape == (5, 180, 360)
    at = {"deep sea": (20, 10), "lowland": (10, 200), "mountains": (150, 200), "lake": (37, 255)}
    assert {MAP[planes[3][place]] for place in at.values()} == set(at)
    assert [MAP[planes[3][place]] for place in at.values()] == list(at)
    assert planes[4, 20, 10] < 127 < planes[4, 10, 200] < planes[4, 150, 200]
    assert (planes[3] == MAP.index("lake")).nonzero().float().mean(0).tolist() == pytest.approx([37, 254.5])


def test_blue_marble_tile_has_map_and_relief_flipped_together(earth):
    data = BlueMarble(root=earth, size=32, band=(-180, -170))
    assert data.shape == (3, 32, 32)
    batch = data.batch([(epoch, i) for epoch in range(6) for i in range(len(data))])
    index, flip = torch.tensor(batch["index"]), batch["flip"]
    assert 0 < flip.sum() < len(flip)
    assert batch["map"].shape == (len(flip), 32, 32)
    assert batch["map"].dtype == torch.int64
    assert batch["relief"].shape == (len(flip), 1, 32, 32)
    for name, plain in (
        ("image", data.pixels(index)),
        ("map", data.maps[index].long()),
        ("relief", data.reliefs[index] / 127.5 - 1),
    ):
        assert torch.equal(batch[name][~flip], plain[~flip])
        assert torch.equal(batch[name][flip], plain[flip].flip(-1))
        assert not torch.equal(batch[name][flip], plain[flip]), name
    about = data.batch_metadata([(3, 1)])
    assert all(torch.equal(about[name], data.batch([(3, 1)])[name]) for name in ("map", "relief")), (
        "beside cached latents too"
    )


def test_blue_marble_relief_is_zero_at_shore(earth):
    data = BlueMarble(root=earth, size=32, band=(-180, -170), flip=False)
    batch = data.batch([(0, i) for i in range(len(data))])
    mean = [
        batch["relief"][:, 0][batch["map"] == MAP.index(name)].mean().item()
        for name in ("deep sea", "lowland", "mountains")
    ]
    assert mean == pytest.approx([-((4500 / 11000) ** 0.5), (100 / 8500) ** 0.5, (4500 / 8500) ** 0.5], abs=0.07)


def test_blue_marble_test_tiles_are_in_band(earth):
    train, test = BlueMarble(root=earth, size=20, band=(0, 60)), BlueMarble("test", root=earth, size=20, band=(0, 60))
    assert (len(train), len(test)) == (9 * 15, 9 * 3)
    assert train.fingerprint != test.fingerprint
    for stride in (20, 7):
        inside = {x for _, x in tiles((180, 360), (20, 20), stride, (0, 60), "test")}
        outside = {x for _, x in tiles((180, 360), (20, 20), stride, (0, 60), "train")}
        assert min(inside) >= 180
        assert max(inside) + 20 <= 240
        assert all(x + 20 <= 180 or x >= 240 for x in outside)
    assert len(BlueMarble(root=earth, size=20, stride=10, band=(0, 60))) > 3 * len(train)
    wide = BlueMarble("test", root=earth, size=[20, 30], band=(0, 60))
    assert (len(wide), wide.shape, wide.maps.shape[1:]) == (9 * 2, (3, 20, 30), (20, 30))
    assert torch.equal(wide.images[0, ..., :20], test.images[0])
    assert len(BlueMarble("test", root=earth, size=20, stride=10, band=(0, 60))) == len(test)


def test_blue_marble_can_skip_sea_tiles(earth):
    whole, land = BlueMarble(root=earth, size=20), BlueMarble(root=earth, size=20, land=0.5)
    assert 0 < len(land) < len(whole)
    assert land.maps.min() > 2
    assert 0 in whole.labels
    assert 0 not in land.labels
    with pytest.raises(ValueError, match=r"no train tile of 200 px with land=0\.0"):
        BlueMarble(root=earth, size=200)


def test_blue_marble_classes_follow_height_and_water():
    metres = np.array([-8000, -3000, -50, 5, 50, 500, 1500, 5000, 8000])
    water = np.array([0, 0, 0, 2, 1, 1, 1, 1, 1])
    assert classes(to_bytes(metres), water).tolist() == list(range(9))
    assert classes(to_bytes(metres[4:5]), np.array([0])).tolist() == [2], "the mask says what is sea"
    maps = torch.stack([torch.full((10, 10), c) for c in (0, 2, 4, 5, 6, 7, 8)])
    maps[1, :3] = 4
    assert kinds(maps).tolist() == [0, 1, 2, 3, 4, 4, 5]


def test_blue_marble_decodes_once(earth, monkeypatch):
    first = BlueMarble(root=earth, size=20)
    monkeypatch.setattr(blue_marble, "read", None)
    assert torch.equal(BlueMarble(root=earth, size=20).images, first.images)
    assert len(BlueMarble("test", root=earth, size=16))


@pytest.mark.parametrize(
    "option", [{"split": "val"}, {"size": 8}, {"stride": 0}, {"land": 2.0}, {"band": [10, 0]}, {"band": [0, 200]}]
)
def test_blue_marble_rejects_invalid_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        BlueMarble(**option)


def test_blue_marble_reports_missing_files(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    with pytest.raises(AssetNotFoundError, match=r"^blue-marble is missing.*put bmng\.jpg, etopo1\.jpg"):
        BlueMarble()


@pytest.mark.slow
def test_blue_marble_real_data():
    train, test = BlueMarble(), BlueMarble("test")
    assert (len(train), len(test)) == (3108, 336)
    assert len(tiles((2700, 5400), (64, 64), 64, (-180, 180), "test")) == 3528
    planes = blue_marble.read(blue_marble.blue_marble())
    for name, east, north in (
        ("lowland", -60, -5),
        ("mountains", 88, 33),
        ("ice", -40, 72),
        ("lake", -87, 44),
        ("deep sea", -50, 25),
    ):
        x, y = int((east + 180) * 15), int((90 - north) * 15)
        assert MAP[planes[3, y - 5 : y + 5, x - 5 : x + 5].flatten().mode().values] == name
    sea = planes[:3, (planes[3] == 0)].float().mean(1)
    assert sea[2] > 2 * sea[0], "the sea is blue"
    assert planes[:3, planes[3] == MAP.index("ice")].float().mean() > 200, "and ice white"
