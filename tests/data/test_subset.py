"""Some rows of a data set, as that data set gives them."""

import torch

from ldm.data.degrade import DegradedDataset, bicubic
from ldm.data.latents import LatentDataset, encode_latents
from ldm.data.subset import Subset, choose_rows
from ldm.data.synthetic import Synthetic


class Moments:
    """A first stage whose moments are the pixels."""

    def posterior(self, image):
        return type("Posterior", (), {"moments": image})

    def parameters(self):
        return iter([torch.zeros(1)])

    buffers = parameters


def data():
    return DegradedDataset(Synthetic("test", num=20, size=16, flip=True), low_res=bicubic)


def test_subset_batches_equal_those_of_data_set():
    whole = data()
    part = Subset(whole, [11, 3, 17])
    assert len(part) == 3
    for method in ("batch", "batch_metadata"):
        got, expected = getattr(part, method)([(2, 2), (0, 0)]), getattr(whole, method)([(2, 17), (0, 11)])
        assert got["index"] == [2, 0]
        assert got.keys() == expected.keys() >= {"low_res"}
        for name, value in expected.items():
            if name != "index":
                assert torch.equal(got[name], value) if isinstance(value, torch.Tensor) else got[name] == value, name
    assert torch.equal(part.pixels([1]), whole.pixels([3]))
    assert "image" not in part.batch_metadata([(0, 0)])


def test_subset_with_latents_has_moments_of_its_images():
    part = Subset(data(), [11, 3, 17, 0, 8])
    samples = [(0, i) for i in (4, 1, 2)]
    assert len({bool(flip) for flip in part.batch(samples)["flip"]}) == 2
    batch = LatentDataset(part, encode_latents(Moments(), part), image=True).batch(samples)
    assert torch.equal(batch["moments"], batch["image"].half().float())


def test_subset_fingerprint_depends_on_rows_and_data():
    prints = {Subset(data(), rows).fingerprint for rows in ([0, 1], [1, 0], [0, 1, 2])}
    assert len(prints | {data().fingerprint}) == 4
    assert Subset(data(), [0, 1]).fingerprint == Subset(data(), [0, 1]).fingerprint


def test_choose_rows_is_keyed_and_nested():
    rows = choose_rows(1000, 64, seed=3)
    assert len(set(rows)) == 64
    assert set(rows) <= set(range(1000))
    assert choose_rows(1000, 10, seed=3) == rows[:10]
    assert choose_rows(1000, 64, seed=4) != rows
    assert sorted(choose_rows(5, 64, seed=3)) == list(range(5))
    assert abs(sum(rows) / 64 - 499.5) < 4 * 288.7 / 8  # a uniform draw: standard deviation 288.7
