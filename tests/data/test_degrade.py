import math
import pickle
from functools import partial

import pytest
import torch

from ldm.data import degrade
from ldm.data.degrade import DegradedDataset, bicubic, bsr, identity, jpeg
from ldm.data.masks import strokes
from ldm.data.stream import BatchDataset, BatchStream
from ldm.data.synthetic import Synthetic


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(size=64, channels=3):
    """Smooth colours with an edge."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y, torch.sign(x + y) * 0.5][:channels])


def test_degraded_dataset_adds_requested_keys_only():
    data = Synthetic(num=20, size=32, flip=True)
    worse = DegradedDataset(data, low_res=bicubic, mask=strokes)
    at = [(0, 3), (4, 7), (4, 3)]
    batch, plain = worse.batch(at), data.batch(at)
    assert set(batch) == {*plain, "low_res", "mask"}
    assert batch["low_res"].shape == (3, 1, 8, 8)
    assert batch["mask"].shape == (3, 1, 32, 32)
    assert torch.equal(batch["image"], plain["image"])
    assert set(DegradedDataset(data, mask=strokes).batch(at)) == {*plain, "mask"}
    about = worse.batch_metadata(at)
    assert set(about) == {*data.batch_metadata(at), "low_res", "mask"}
    assert torch.equal(about["low_res"], batch["low_res"])
    assert len(worse) == 20
    assert (worse.fingerprint, worse.captions, worse.shape, worse.flip) == (
        data.fingerprint,
        data.captions,
        data.shape,
        True,
    )
    assert torch.equal(worse.pixels([4]), data.pixels([4]))
    assert identity(data) is data


def test_degraded_dataset_is_keyed_by_seed_epoch_and_index():
    data = Synthetic(num=20, size=32)
    worse = DegradedDataset(data, partial(bsr, factor=2), strokes)
    alone, among = worse.batch([(2, 5)]), worse.batch([(0, 1), (2, 5)])
    for name in ("low_res", "mask"):
        assert torch.equal(alone[name][0], among[name][1])
        assert not torch.equal(worse.batch([(3, 5)])[name], alone[name])
        assert not torch.equal(
            DegradedDataset(data, partial(bsr, factor=2), strokes, seed=1).batch([(2, 5)])[name], alone[name]
        )
    ranks = [BatchDataset(worse)[BatchStream(20, 6, 2, rank=r, world=2).batch_at(1)] for r in range(2)]
    whole = BatchDataset(worse)[BatchStream(20, 6, 2).batch_at(1)]
    assert torch.equal(torch.cat([r["mask"] for r in ranks]), whole["mask"])
    assert torch.equal(torch.cat([r["low_res"] for r in ranks]), whole["low_res"])


def test_degraded_dataset_low_res_follows_flip():
    data = Synthetic(num=20, size=32, flip=True)
    batch = DegradedDataset(data, low_res=bicubic).batch([(0, i) for i in range(20)])
    expected = torch.stack([bicubic(image, generator()) for image in batch["image"]])
    assert torch.equal(batch["low_res"], expected)
    mirrored = torch.stack([bicubic(image, generator()) for image in data.pixels(range(20))])[batch["flip"]].flip(-1)
    torch.testing.assert_close(batch["low_res"][batch["flip"]], mirrored, atol=1e-5, rtol=0)


def test_degraded_dataset_is_picklable():
    worse = pickle.loads(pickle.dumps(DegradedDataset(Synthetic(num=4), low_res=bicubic)))
    assert worse.batch([(0, 1)])["low_res"].shape == (1, 1, 8, 8)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        worse.nothing_like_it  # noqa: B018


def test_bicubic_preserves_flat_colours_without_aliasing():
    assert torch.allclose(bicubic(torch.full((3, 16, 16), 0.3), generator()), torch.tensor(0.3), atol=1e-6)
    fine = torch.ones(1, 32, 32)
    fine[:, :, ::2] = -1
    assert bicubic(fine, generator(), factor=4).abs().max() < 0.1
    small = bicubic(scene(), generator(), factor=4)
    torch.testing.assert_close(
        small[:2, 2:-2, 2:-2],
        scene(64)[:2].unfold(1, 4, 4).unfold(2, 4, 4).mean((-1, -2))[:, 2:-2, 2:-2],
        atol=2e-3,
        rtol=0,
    )
    assert bicubic(torch.eye(16)[None] * 2 - 1, generator(), factor=2).abs().max() <= 1
    with pytest.raises(ValueError, match="factor=4 does not divide the image's 64x30"):
        bicubic(torch.zeros(1, 64, 30), generator())


@pytest.mark.parametrize("channels", [1, 3])
def test_bsr_is_worse_than_bicubic_of_same_image(channels):
    clean = bicubic(scene(channels=channels), generator())
    drawn = torch.stack([bsr(scene(channels=channels), generator(i)) for i in range(40)])
    assert drawn.shape == (40, channels, 16, 16)
    assert drawn.abs().max() <= 1
    error = (drawn - clean).square().mean((1, 2, 3)).sqrt()
    assert 0.01 < error.min() < 0.05 < error.max() < 0.4
    assert (drawn.mean(0) - clean).abs().mean() < 0.06, "no shift, no change of colour"
    assert torch.equal(bsr(scene(channels=channels), generator(7)), drawn[7])


def test_bsr_options_change_degradation():
    still = {"blur": (0.2, 0.2), "noise": (0.0, 0.0), "quality": (95, 95)}

    def far(**options):
        made = torch.stack([bsr(scene(), generator(i), **{**still, **options}) for i in range(12)])
        return (made - bicubic(scene(), generator())).square().mean().sqrt().item()

    assert far() < 0.06
    assert far(noise=(0.3, 0.3)) > 2 * far()
    assert far(quality=(3, 3)) > 1.5 * far()
    assert far(blur=(3.0, 3.0)) > 1.5 * far()


@pytest.mark.parametrize(("sigma", "angle"), [((1.5, 0.6), 0.4), ((0.5, 1.2), 2.5)])
def test_blur_kernel_is_a_rotated_anisotropic_gaussian(sigma, angle):
    """With the covariance R diag(sigma^2) R^T, R a rotation by `angle` in (x, y)."""
    c, s = math.cos(angle), math.sin(angle)
    rotation = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    covariance = rotation @ torch.diag(torch.tensor(sigma, dtype=torch.float64) ** 2) @ rotation.T
    image = scene(32, 2)
    padded, kernel = degrade._kernel(image, sigma, angle)
    reach = math.ceil(3 * max(sigma))
    assert kernel.shape == (2, 1, 2 * reach + 1, 2 * reach + 1)
    assert torch.equal(padded[0, :, reach:-reach, reach:-reach], image)
    axis = torch.arange(-reach, reach + 1, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis).flip(1)  # (x, y), row by row
    expected = torch.exp(-0.5 * torch.einsum("ni,ij,nj->n", points, covariance.inverse(), points))
    taps = kernel.double().flatten(1)
    torch.testing.assert_close(taps, (expected / expected.sum()).expand(2, -1), atol=1e-7, rtol=1e-4)
    moments = torch.einsum("n,ni,nj->ij", taps[0], points, points)
    torch.testing.assert_close(moments, covariance, atol=0.06, rtol=0)  # it is cut off at three deviations


def test_blur_kernel_reaches_no_further_than_reflection():
    image = scene(5, 1)
    padded, kernel = degrade._kernel(image, (9.0, 9.0), 0.0)
    assert kernel.shape == (1, 1, 9, 9)
    assert torch.equal(
        padded[0, 0],
        torch.cat([image.flip(2)[..., :4], image, image.flip(2)[..., 1:]], 2)[0][
            [4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0]
        ],
    )


def test_bsr_adds_noise(monkeypatch):
    """With no other step: nothing to blur, shrink or compress."""
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.full(shape, 0.5))
    monkeypatch.setattr(degrade, "jpeg", lambda image, quality: image)
    made = bsr(scene() / 2, generator(), factor=1, blur=(0.01, 0.01), noise=(0.2, 0.2))
    torch.testing.assert_close(made, scene() / 2 + 0.1, atol=1e-6, rtol=0)


def test_jpeg_at_high_quality_is_nearly_lossless():
    for channels in (1, 3):
        image = scene(32, channels)
        assert (jpeg(image, 95) - image).abs().mean() < 0.02
        assert (jpeg(image, 5) - image).abs().mean() > 0.02
