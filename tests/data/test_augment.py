"""Augmentations against closed forms and torchvision, and that each is a function of seed, epoch and index alone."""

import colorsys
import math
import pickle

import pytest
import torch

from ldm.data.augment import (
    AugmentedDataset,
    Box,
    RandomCrop,
    RandomResizedCrop,
    resize,
)
from ldm.data.color import (
    ColorJitter,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    to_grey,
)
from ldm.data.degrade import DegradedDataset, bicubic
from ldm.data.memory import InMemoryDataset
from ldm.data.stream import BatchDataset, BatchStream
from ldm.data.subset import Subset
from ldm.data.synthetic import Synthetic
from ldm.errors import ConfigError
from ldm.tensors import derive_seed

SAMPLES = [(0, 3), (4, 7), (4, 3), (1, 11), (2, 0)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Colours(InMemoryDataset):
    """Random colours, each pixel another, with a map and a relief of the pixels' rows and columns."""

    def __init__(self, num=12, size=12, flip=False):
        images = torch.randint(0, 256, (num, 3, size, size), generator=generator(1), dtype=torch.uint8)
        super().__init__("colours", images, torch.zeros(num), {"thing": ["a thing"]}, 0, flip)

    def batch_metadata(self, samples):
        batch, side = super().batch_metadata(samples), self.stored.shape[-1]
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        columns = torch.stack([columns.flip(-1) if flip else columns for flip in batch["flip"]])
        return {**batch, "map": rows.expand(len(samples), side, side), "relief": columns[:, None].float()}


def test_random_crop_is_the_recorded_part():
    data = Colours()
    augmented = AugmentedDataset(data, training=True, crop=RandomCrop(8))
    batch, whole = augmented.batch(SAMPLES), data.batch(SAMPLES)
    assert batch["image"].shape == (5, 3, 8, 8)
    for name in ("original_size", "crop", "crop_size", "target_size"):
        assert (batch[name].dtype, batch[name].shape) == (torch.int64, (5, 2))
    assert (batch["original_size"] == 12).all()
    assert (batch["crop_size"] == 8).all()
    assert (batch["target_size"] == 8).all()
    for i, (top, left) in enumerate(batch["crop"].tolist()):
        for name in ("image", "map", "relief"):
            assert torch.equal(batch[name][i], whole[name][i, ..., top : top + 8, left : left + 8])
        assert batch["map"][i, 0, 0] == top
        assert batch["relief"][i, 0, 0, 0] == left
    assert batch["map"].dtype == torch.int64
    assert {name for name in batch if name not in whole} == {"original_size", "crop", "crop_size", "target_size"}
    assert (augmented.shape, augmented.stored_shape, len(augmented)) == ((3, 8, 8), (3, 12, 12), 12)


def test_crops_of_other_shapes_than_squares():
    data = Synthetic(num=12, size=[16, 24])
    cut = AugmentedDataset(data, training=True, crop=RandomCrop([8, 20]))
    batch, whole = cut.batch(SAMPLES), data.batch(SAMPLES)
    assert batch["image"].shape[1:] == cut.shape == (1, 8, 20)
    for i, (top, left) in enumerate(batch["crop"].tolist()):
        assert torch.equal(batch["image"][i], whole["image"][i, ..., top : top + 8, left : left + 20])
    assert torch.equal(cut.pixels([3]), data.pixels([3])[..., 4:12, 2:22])
    with pytest.raises(ConfigError, match=r"crop.size=\[8, 30\]: the images have 16x24 pixels"):
        RandomCrop([8, 30]).centre(16, 24)
    same = AugmentedDataset(data, training=True, crop=RandomResizedCrop())
    assert same.shape == (1, 16, 24)
    assert torch.equal(same.pixels([1, 2]), data.pixels([1, 2])), "the whole image has the shape of the crop"
    assert RandomResizedCrop([10, 5]).centre(16, 24) == (0, 8, 16, 8)
    flat = AugmentedDataset(data, training=True, flip=0.5)
    assert flat.batch_metadata(SAMPLES)["flip"].tolist() == flat.batch(SAMPLES)["flip"].tolist()
    with pytest.raises(ConfigError, match=r"augmentation: samples of shape \(1, 7\) are no images"):
        AugmentedDataset(InMemoryDataset("x", torch.zeros(2, 1, 7)), training=True, flip=0.5)
    with pytest.raises(ConfigError, match=r"augmentation.color: expected images of 1 or 3 channels, not 2;"):
        AugmentedDataset(InMemoryDataset("x", torch.zeros(2, 2, 7, 7)), training=True, color=ColorJitter())
    with pytest.raises(ConfigError, match=r"degradation: samples of shape \(1, 7\) are no images; leave it out"):
        DegradedDataset(InMemoryDataset("x", torch.zeros(2, 1, 7)), low_res=bicubic)


def test_random_crop_corner_is_uniform():
    boxes = [RandomCrop(5).sample(7, 9, generator(seed)) for seed in range(1500)]
    for side, corners in ((7 - 5 + 1, [box.top for box in boxes]), (9 - 5 + 1, [box.left for box in boxes])):
        counts = torch.tensor(corners).bincount(minlength=side)
        assert len(counts) == side
        expected = len(boxes) / side
        assert ((counts - expected) ** 2 / expected).sum() < 20  # chi-squared of at most 4 degrees: p < 0.001
    assert RandomCrop(7).sample(7, 7, generator()) == Box(0, 0, 7, 7)


def test_random_resized_crop_has_area_and_ratio_in_range():
    crop = RandomResizedCrop(8, (0.25, 0.5), (0.5, 2.0))
    boxes = [crop.sample(1000, 1000, generator(seed)) for seed in range(400)]
    area = torch.tensor([box.height * box.width / 1e6 for box in boxes])
    ratio = torch.tensor([box.width / box.height for box in boxes])
    assert 0.248 < area.min() < 0.26 < 0.49 < area.max() < 0.502
    assert 0.497 < ratio.min() < 0.52 < 1.92 < ratio.max() < 2.01
    assert abs(float(area.mean()) - 0.375) < 4 * (0.25 / 12**0.5) / 20  # uniform area, four standard errors
    assert abs(float(ratio.log().mean())) < 4 * (2 * math.log(2) / 12**0.5) / 20  # log-uniform ratio
    assert all(box.top + box.height <= 1000 and box.left + box.width <= 1000 for box in boxes)
    assert {box.top for box in boxes} != {0}


@pytest.mark.parametrize(
    ("shape", "ratio", "box"),
    [
        ((10, 100), (1.0, 1.0), Box(0, 45, 10, 10)),
        ((100, 10), (1.0, 1.0), Box(45, 0, 10, 10)),
        ((10, 100), (1.0, 2.0), Box(0, 40, 10, 20)),
        ((100, 10), (0.5, 1.0), Box(40, 0, 20, 10)),
    ],
)
def test_random_resized_crop_without_a_fit_is_the_largest_central_part(shape, ratio, box):
    crop = RandomResizedCrop(None, (1.0, 1.0), ratio)  # the whole area, of another shape than the image's
    assert crop.sample(*shape, generator()) == box


def test_random_resized_crop_equals_resized_part():
    data = Colours(size=16)
    batch = AugmentedDataset(data, training=True, crop=RandomResizedCrop(6, (0.2, 0.9))).batch(SAMPLES)
    whole = data.batch(SAMPLES)
    assert batch["image"].shape == (5, 3, 6, 6)
    assert (batch["target_size"] == 6).all()
    assert batch["map"].shape == (5, 6, 6)
    for i in range(5):
        (top, left), (height, width) = batch["crop"][i].tolist(), batch["crop_size"][i].tolist()
        part = whole["image"][i, :, top : top + height, left : left + width]
        assert torch.equal(batch["image"][i], resize(part, (6, 6)))
        rows = torch.tensor([top + int((k + 0.5) * height / 6) for k in range(6)])
        assert torch.equal(batch["map"][i], rows[:, None].expand(6, 6)), "the nearest row, not a mean of two"


def test_resize_halves_a_ramp_by_its_filter():
    """Antialiasing by a half: a triangle of weights 1, 3, 3, 1 of 8 in each direction, so that a ramp stays a ramp."""
    ramp = torch.arange(16.0).expand(1, 16, 16)
    small = resize(ramp, (8, 8))
    torch.testing.assert_close(small[0, :, 1:-1], (torch.arange(8.0) * 2 + 0.5)[1:-1].expand(8, 6))
    impulse = torch.zeros(1, 8, 8)
    impulse[0, :, 4] = 8
    torch.testing.assert_close(resize(impulse, (4, 4))[0, 0], torch.tensor([0.0, 1.0, 3.0, 0.0]))
    assert resize(ramp, (16, 16)) is ramp


@pytest.mark.parametrize("data_flips", [False, True])
def test_flip_mirrors_image_and_maps_and_is_recorded(data_flips):
    data = Colours(flip=data_flips)
    augmented = AugmentedDataset(data, training=True, flip=0.5)
    samples = [(epoch, i) for epoch in range(4) for i in range(12)]
    batch, plain = augmented.batch(samples), data.batch(samples)
    turned = batch["flip"] ^ plain["flip"]
    assert 10 < turned.sum() < 38  # of 48: four standard deviations
    for name in ("image", "map", "relief"):
        expected = [x.flip(-1) if flip else x for x, flip in zip(plain[name], turned, strict=True)]
        assert torch.equal(batch[name], torch.stack(expected))
    mirrored = [x.flip(-1) if flip else x for x, flip in zip(data.pixels(batch["index"]), batch["flip"], strict=True)]
    assert torch.equal(batch["image"], torch.stack(mirrored)), "flip says how the image differs from pixels"
    assert augmented.flip
    assert not augmented.changed_by
    assert AugmentedDataset(data, training=False, flip=0.5).flip == data_flips


def test_colours_equal_torchvision():
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = torch.rand(3, 9, 7, generator=generator(), dtype=torch.float64) * 2 - 1
    for amount in (0.0, 0.4, 1.0, 1.7):
        for change, other in (
            (adjust_brightness, functional.adjust_brightness),
            (adjust_contrast, functional.adjust_contrast),
            (adjust_saturation, functional.adjust_saturation),
        ):
            expected = other((image + 1) / 2, amount) * 2 - 1
            # its weight of red is 0.2989 of 1.000: 1e-4 of a value in [0, 1], times 2 and the factor 1 - amount
            torch.testing.assert_close(change(image, amount), expected, rtol=0, atol=2.1e-4)
    for turns in (-0.5, -0.21, 0.1, 0.5):
        expected = functional.adjust_hue((image + 1) / 2, turns) * 2 - 1
        torch.testing.assert_close(adjust_hue(image, turns), expected, rtol=0, atol=3e-6)  # its float32


def test_hue_equals_colorsys():
    image = torch.rand(3, 5, 5, generator=generator(), dtype=torch.float64) * 2 - 1
    image[:, 0, 0], image[:, 0, 1] = 0.3, torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)  # grey, two largest
    changed = adjust_hue(image, 0.3)
    for y in range(5):
        for x in range(5):
            h, s, v = colorsys.rgb_to_hsv(*((image[:, y, x] + 1) / 2).tolist())
            expected = torch.tensor(colorsys.hsv_to_rgb((h + 0.3) % 1, s, v), dtype=torch.float64) * 2 - 1
            torch.testing.assert_close(changed[:, y, x], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(changed[:, 0, 0], image[:, 0, 0], rtol=0, atol=1e-12)


def test_changes_of_colour_in_closed_form():
    image = torch.tensor([[[-0.5, 0.5]], [[0.0, 0.2]], [[0.25, -0.4]]], dtype=torch.float64)
    grey = (0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2])[None]
    torch.testing.assert_close(to_grey(image), grey, rtol=0, atol=1e-6)
    torch.testing.assert_close(adjust_brightness(image, 0.5), (image + 1) * 0.5 - 1)
    torch.testing.assert_close(
        adjust_contrast(image, 0.5), grey.mean() + 0.5 * (image - grey.mean()), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(adjust_saturation(image, 0.5), grey + 0.5 * (image - grey), rtol=0, atol=1e-6)
    assert adjust_brightness(image, 9.0).max() == 1
    assert torch.equal(adjust_saturation(image[:1], 0.5), image[:1])
    assert torch.equal(adjust_hue(image[:1], 0.5), image[:1])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_color_jitter_draws_each_amount_from_its_range(name, monkeypatch):
    amounts = []

    def record(image, amount):
        amounts.append(amount)
        return image

    monkeypatch.setattr(f"ldm.data.color.adjust_{name}", record)
    for seed in range(300):
        ColorJitter(**{name: 0.4})(torch.zeros(3, 1, 1), generator(seed))
    low, high = (-0.4, 0.4) if name == "hue" else (0.6, 1.4)
    assert low <= min(amounts) < low + 0.02 < high - 0.02 < max(amounts) < high
    with monkeypatch.context():
        amounts.clear()
        ColorJitter()(torch.zeros(3, 1, 1), generator())
        assert amounts == [0.0 if name == "hue" else 1.0]


def test_color_jitter_changes_in_random_order():
    """A shift of hue and a change of contrast do not commute: half the draws are in each order."""
    image = torch.rand(3, 4, 4, generator=generator(), dtype=torch.float64) * 0.4 - 0.2
    orders = []
    for seed in range(60):
        changed = ColorJitter(contrast=0.3, hue=0.3)(image, generator(seed))
        draw = generator(seed)
        amounts = [torch.rand((), generator=draw).item() for _ in range(4)]
        factor, turns = 0.7 + 0.6 * amounts[1], -0.3 + 0.6 * amounts[3]
        ways = (
            adjust_hue(adjust_contrast(image, factor), turns),
            adjust_contrast(adjust_hue(image, turns), factor),
        )
        orders.append([torch.allclose(changed, way, rtol=0, atol=1e-12) for way in ways])
    assert all(sum(order) == 1 for order in orders)
    assert 14 < sum(first for first, _ in orders) < 46  # of 60: four standard deviations


EVERYTHING = {"crop": RandomResizedCrop(8), "flip": 0.5, "color": ColorJitter(0.3, 0.3, 0.3, 0.1)}


def test_augmentation_is_keyed_by_seed_epoch_and_index():
    data = Colours(num=20)
    augmented = AugmentedDataset(data, training=True, **EVERYTHING)
    alone, together = augmented.batch([(2, 5)]), augmented.batch([(0, 1), (2, 5)])
    names = ("image", "map", "relief", "flip", "crop", "crop_size", "original_size")
    for name in names:
        assert torch.equal(alone[name][0], together[name][1])
    for other in (
        augmented.batch([(3, 5)]),
        augmented.batch([(2, 6)]),
        AugmentedDataset(data, training=True, **EVERYTHING, seed=1).batch([(2, 5)]),
    ):
        assert not torch.equal(other["crop"], alone["crop"]) or not torch.equal(other["crop_size"], alone["crop_size"])
    draws = {name: generator(derive_seed(0, name, 2, 5)) for name in ("crop", "flip", "color")}  # independent ones
    box, turned = EVERYTHING["crop"].sample(12, 12, draws["crop"]), torch.rand((), generator=draws["flip"]) < 0.5
    assert (*alone["crop"][0].tolist(), *alone["crop_size"][0].tolist()) == box
    assert alone["flip"][0] == turned
    whole = data.pixels([5])[0]
    part = (whole.flip(-1) if turned else whole)[:, box.top : box.top + box.height, box.left : box.left + box.width]
    assert torch.equal(alone["image"][0], EVERYTHING["color"](resize(part, (8, 8)), draws["color"]))
    ranks = [BatchDataset(augmented)[BatchStream(20, 6, 2, rank=r, world=2).batch_at(1)] for r in range(2)]
    whole = BatchDataset(augmented)[BatchStream(20, 6, 2).batch_at(1)]
    for name in names:
        assert torch.equal(torch.cat([rank[name] for rank in ranks]), whole[name])


@pytest.mark.parametrize("changed", ["crop", "flip", "color"])
def test_choices_of_one_transform_do_not_depend_on_the_others(changed):
    data = Colours(num=20)
    samples = [(0, i) for i in range(20)]
    others = {name: value for name, value in EVERYTHING.items() if name != changed}
    both, one = (AugmentedDataset(data, training=True, **o).batch(samples) for o in (EVERYTHING, others))
    assert changed == "flip" or torch.equal(both["flip"], one["flip"])
    assert changed == "crop" or torch.equal(both["crop"], one["crop"])


def test_metadata_of_flips_and_colours_needs_no_image(monkeypatch):
    """Cached latents ask for it in every step."""
    data = AugmentedDataset(Synthetic(num=8, size=8, flip=True), training=True, flip=0.5, color=ColorJitter(0.5))
    samples = [(epoch, index) for epoch in (0, 1) for index in range(8)]
    expected = data.batch(samples)
    monkeypatch.setattr(Synthetic, "pixels", None)
    batch = data.batch_metadata(samples)
    assert batch.keys() == expected.keys() - {"image"}
    assert torch.equal(batch["flip"], expected["flip"])
    assert 0 < batch["flip"].sum() < len(samples)
    assert batch["caption"] == expected["caption"]


def test_evaluation_has_centre_of_each_image():
    data = Colours(flip=False)
    augmented = AugmentedDataset(data, training=False, crop=RandomCrop(8), flip=0.5, color=EVERYTHING["color"])
    batch = augmented.batch(SAMPLES)
    assert torch.equal(batch["image"], data.batch(SAMPLES)["image"][..., 2:10, 2:10])
    assert torch.equal(batch["image"], augmented.pixels(batch["index"]))
    assert (batch["crop"] == 2).all()
    assert not augmented.changed_by
    resized = AugmentedDataset(data, training=True, crop=RandomResizedCrop(6))
    assert torch.equal(resized.pixels([1, 2]), resize(data.pixels([1, 2]), (6, 6)))
    assert resized.changed_by == ["augmentation.crop"]
    assert AugmentedDataset(data, training=True, color=ColorJitter()).changed_by == ["augmentation.color"]


def test_augmented_dataset_is_wrapped_and_identified():
    data = Synthetic(num=20, size=32)
    augmented = AugmentedDataset(data, training=True, crop=RandomCrop(16))
    worse = DegradedDataset(augmented, low_res=bicubic)
    batch = worse.batch([(0, 1), (1, 1)])
    assert batch["low_res"].shape == (2, 1, 4, 4)
    assert torch.equal(batch["low_res"][0], bicubic(batch["image"][0], generator())), "of the cropped image"
    assert (worse.shape, worse.changed_by, worse.captions) == ((1, 16, 16), ["augmentation.crop"], data.captions)
    assert Subset(worse, [4, 7]).batch([(0, 1)])["crop"].tolist() == augmented.batch([(0, 7)])["crop"].tolist()
    assert set(augmented.batch_metadata([(0, 1)])) == set(augmented.batch([(0, 1)])) - {"image"}
    fingerprints = {
        data.fingerprint,
        augmented.fingerprint,
        AugmentedDataset(data, training=True, crop=RandomCrop(8)).fingerprint,
    }
    assert len(fingerprints) == 3
    assert AugmentedDataset(data, training=True, flip=0.5).fingerprint == data.fingerprint
    again = pickle.loads(pickle.dumps(augmented))
    assert torch.equal(again.batch([(0, 1)])["image"], augmented.batch([(0, 1)])["image"])
    with pytest.raises(AttributeError, match="nothing_like_it"):
        augmented.nothing_like_it  # noqa: B018


class Boxes(Synthetic):
    def batch(self, samples):
        return {**super().batch(samples), "boxes": [[]] * len(samples)}


class Shapes(Synthetic):
    shapes = ((8, 16), (16, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(0), "crop.size=0: expected 1 pixel or more"),
        (lambda: RandomCrop(40).sample(32, 64, generator()), "crop.size=40: the images have 32x64 pixels; choose"),
        (lambda: RandomCrop(40).centre(64, 32), "crop.size=40: the images have 64x32 pixels"),
        (lambda: RandomResizedCrop(0), r"crop.size=0: expected 1 pixel or more, or \[height,width\], or null"),
        (lambda: RandomResizedCrop(8, (0.0, 1.0)), r"crop.scale=\[0.0, 1.0\]: expected two fractions"),
        (lambda: RandomResizedCrop(8, (0.5, 0.4)), r"crop.scale=\[0.5, 0.4\]"),
        (lambda: RandomResizedCrop(8, (0.5, 1.1)), r"crop.scale=\[0.5, 1.1\]"),
        (lambda: RandomResizedCrop(8, (0.5, 1.0), (2.0, 1.0)), r"crop.ratio=\[2.0, 1.0\]"),
        (lambda: RandomResizedCrop(8, (0.5, 1.0), (0.0, 1.0)), r"crop.ratio=\[0.0, 1.0\]"),
        (lambda: ColorJitter(brightness=-0.1), "color.brightness=-0.1: expected 0 or more"),
        (lambda: ColorJitter(hue=0.6), "color.hue=0.6: expected 0 to 0.5 turns"),
        (lambda: ColorJitter()(torch.zeros(4, 8, 8), generator()), r"augmentation.color: .* got \(4, 8, 8\)"),
        (lambda: AugmentedDataset(Synthetic(num=2), training=True, flip=1.5), "augmentation.flip=1.5: expected a"),
        (
            lambda: AugmentedDataset(Boxes(num=2), training=True, crop=RandomCrop(8)).batch([(0, 0)]),
            "augmentation.crop: the boxes of a layout",
        ),
        (lambda: AugmentedDataset(Shapes(num=2), training=True, flip=0.5), "images of several shapes are neither"),
    ],
)
def test_invalid_augmentation_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
