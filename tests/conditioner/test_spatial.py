"""Maps, low resolution and masks on the latent's grid: where each pixel goes, what is learned, what the null says."""

import pytest
import torch
from torch.nn import functional as F

from ldm.conditioner.spatial import LowResolution, MaskedImage, SemanticMap, SourceImage, SpatialMap
from ldm.tensors import KeyedNoise


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_semantic_map_matches_rescaler():
    conditioner = SemanticMap(4, 5, channels=3)
    labels = torch.randint(0, 5, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    shares = F.one_hot(labels, 5).movedim(-1, 1).float()
    halved = F.interpolate(F.interpolate(shares, scale_factor=0.5, mode="bilinear"), scale_factor=0.5, mode="bilinear")
    cond = conditioner({"map": labels})
    assert cond.concat.shape == (2, conditioner.concat_channels, 2, 3)
    torch.testing.assert_close(cond.concat, F.conv2d(halved, conditioner.mix.weight))
    assert torch.equal(conditioner({"map": shares}).concat, cond.concat)
    assert not conditioner.null({"map": labels}).concat.any()
    assert [name for name, _ in conditioner.named_parameters()] == ["mix.weight"]


@pytest.mark.parametrize(
    ("map", "said"),
    [
        (torch.full((1, 4, 4), 5), "classes 5 to 5: expected 0 to 4"),
        (torch.zeros(1, 4, 4), r"expected classes \(B, H, W\)"),
        (torch.zeros(1, 6, 4, dtype=torch.long), "6x4: height and width must be multiples of 4"),
    ],
)
def test_semantic_map_rejects_invalid_map(map, said):
    with pytest.raises(ValueError, match=said):
        SemanticMap(4, 5)({"map": map})


def test_spatial_map_averages_and_marks_null():
    conditioner, relief = SpatialMap(2), rand(2, 1, 4, 6)
    cond, null = conditioner({"relief": relief}), conditioner.null({"relief": relief})
    torch.testing.assert_close(cond.concat[0, 0, 1, 2], relief[0, 0, 2:4, 4:6].mean())
    assert cond.concat[:, 1].eq(1).all()
    assert null.concat.shape == cond.concat.shape == (2, 2, 2, 3)
    assert not null.concat.any()


@pytest.mark.parametrize(("factor", "scale", "channels"), [(4, 4, 3), (4, 2, 12), (2, 4, 3)])
def test_low_resolution_preserves_every_pixel(factor, scale, channels):
    conditioner, low = LowResolution(factor, 3, scale), rand(2, 3, 16 // scale, 24 // scale)
    cond, null = conditioner({"low_res": low}), conditioner.null({"low_res": low})
    assert cond.concat.shape == null.concat.shape == (2, channels + 1, 16 // factor, 24 // factor)
    assert conditioner.concat_channels == channels + 1
    back = F.pixel_shuffle(cond.concat[:, :-1], conditioner.fold)
    assert torch.equal(back[..., :: conditioner.repeat, :: conditioner.repeat], low)
    assert not cond.concat[:, -1].any()
    assert not null.concat[:, :-1].any()
    assert null.concat[:, -1].eq(1).all()
    assert conditioner.null({"noise": KeyedNoise(0, [1, 2])}).concat.tolist() == null.concat[:, :, :1, :1].tolist()


def test_low_resolution_noise_is_keyed_and_its_level_is_input():
    conditioner = LowResolution(4, 1, noise_augmentation=0.5)
    batch = {"low_res": torch.ones(2000, 1, 4, 4), "noise": KeyedNoise(0, list(range(2000)))}
    concat = conditioner(batch).concat
    level = concat[:, 1, 0, 0]
    assert 0.0 <= float(level.min()) < 0.01 < 0.49 < float(level.max()) < 0.5
    error = concat[:, 0] - (1 - level[:, None, None] ** 2).sqrt()
    torch.testing.assert_close((error / level[:, None, None]).std(), torch.tensor(1.0), atol=0.02, rtol=0)
    part = {"low_res": batch["low_res"][:3], "noise": KeyedNoise(0, [7, 8, 9])}
    assert torch.equal(conditioner(part).concat, concat[7:10])
    conditioner.eval()
    assert torch.equal(conditioner(part).concat[:, 0], part["low_res"][:, 0])
    told = conditioner({**part, "level": 0.3}).concat
    torch.testing.assert_close(told[:, 1], torch.full((3, 4, 4), 0.3))
    assert (told[:, 0] != 1).all()


def test_low_resolution_mixes_image_with_keyed_noise():
    """At level 0.6, 0.8 x + 0.6 eps."""
    conditioner, low, noise = LowResolution(4, 3).eval(), rand(2, 3, 4, 4), KeyedNoise(0, [5, 6])
    concat = conditioner({"low_res": low, "noise": noise, "level": 0.6}).concat
    torch.testing.assert_close(concat[:, :3], 0.8 * low + 0.6 * noise.normal("low_res", low))
    torch.testing.assert_close(concat[:, 3], torch.full((2, 4, 4), 0.6))


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (1, 3, 3, 4), (1, 3, 4, 3)])
def test_low_resolution_rejects_other_shapes(shape):
    with pytest.raises(ValueError, match="expected 3 channels, height and width in multiples of 2"):
        LowResolution(4, 3, scale=2)({"low_res": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale": 3}, "scale=3"),
        ({"noise_augmentation": 1.0}, "noise_augmentation=1.0"),
        ({"noise_augmentation": -0.1}, "noise_augmentation"),
    ],
)
def test_low_resolution_rejects_invalid_options(options, said):
    with pytest.raises(ValueError, match=said):
        LowResolution(4, 3, **options)


def test_masked_image_concatenates_mask_and_masked_latent():
    seen = []

    def encode(image):
        seen.append(image)
        return F.avg_pool2d(image, 4)

    conditioner = MaskedImage(4, 3, encode)
    image, mask = rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[0, 0, 3, 4] = 1
    cond = conditioner({"image": image, "mask": mask})
    assert cond.concat.shape == (2, conditioner.concat_channels, 2, 2)
    assert cond.concat[:, 0].tolist() == [[[0, 1], [0, 0]], [[0, 0], [0, 0]]]
    assert seen[0][0, :, 3, 4].tolist() == [0, 0, 0]
    assert torch.equal(seen[0][1], image[1])
    assert torch.equal(cond.concat[:, 1:], F.avg_pool2d(seen[0], 4))
    null = conditioner.null({"mask": mask})
    assert null.concat[:, 0].eq(1).all()
    assert not null.concat[:, 1:].any()
    assert list(conditioner.parameters()) == []
    with pytest.raises(ValueError, match=r"mask of \(2, 1, 4, 8\): expected \(2, 1, 8, 8\)"):
        conditioner({"image": image, "mask": mask[:, :, :4]})


def test_source_image_is_its_latent_and_null_is_zero():
    made = SourceImage(2, 3, lambda image: F.avg_pool2d(image, 2) * 5)
    batch = {"image": torch.zeros(2, 3, 4, 6), "source": torch.rand(2, 3, 4, 6)}
    assert torch.equal(made(batch).concat, F.avg_pool2d(batch["source"], 2) * 5)
    assert torch.equal(made.null(batch).concat, torch.zeros(2, 3, 2, 3))
    assert made.null({"noise": KeyedNoise(0, [0, 1])}).concat.shape == (2, made.concat_channels, 1, 1)
    frozen = SourceImage(2, 3, torch.nn.Conv2d(3, 3, 2, 2))
    assert not frozen(batch).concat.requires_grad
