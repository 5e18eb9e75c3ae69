"""Pairs of edits: pixels written out, keys, and what other wrappers leave of them."""

import pickle

import pytest
import torch
from hydra.utils import instantiate

from ldm.config.compose import compose_option
from ldm.data.augment import AugmentedDataset, RandomCrop
from ldm.data.edits import Edit, EditDataset, mirror, rotate
from ldm.data.synthetic import Synthetic
from ldm.errors import ConfigError

SAMPLES = [(epoch, index) for epoch in range(4) for index in range(40)]


@pytest.fixture(scope="module")
def data() -> EditDataset:
    """The edits of degradation=edits, on images that are flipped at random."""
    return instantiate(compose_option("degradation", "edits"))(Synthetic(num=40, size=16, flip=True))


def test_edits_move_and_change_pixels(data):
    image = torch.linspace(-1, 1, 16).reshape(1, 4, 4)
    expected = {
        "mirror it": lambda i, j: image[0, i, 3 - j],
        "turn it upside down": lambda i, j: image[0, 3 - i, j],
        "rotate it to the left": lambda i, j: image[0, j, 3 - i],  # the right column becomes the top row
        "rotate it to the right": lambda i, j: image[0, 3 - j, i],  # the left column becomes the top row
        "invert the colours": lambda i, j: -image[0, i, j],
        "make it darker": lambda i, j: -1 + (image[0, i, j] + 1) / 2,
    }
    assert data.classes == list(expected)
    for edit, pixel in zip(data.edits, expected.values(), strict=True):
        rows = torch.stack([torch.stack([pixel(i, j) for j in range(4)]) for i in range(4)])
        torch.testing.assert_close(edit.change(image)[0], rows)


def test_batch_is_source_instruction_and_edited_image(data):
    batch, plain = data.batch(SAMPLES), data.dataset.batch(SAMPLES)
    assert torch.equal(batch["source"], plain["image"])
    assert torch.equal(batch["flip"], plain["flip"])
    assert batch["label"].dtype == torch.int64
    for i, k in enumerate(batch["label"].tolist()):
        assert torch.equal(batch["image"][i], data.edits[k].change(plain["image"][i]))
        assert batch["caption"][i] in data.captions[k]
    metadata = data.batch_metadata(SAMPLES)
    assert metadata.keys() == batch.keys() - {"image", "source"}
    assert (metadata["caption"], metadata["label"].tolist()) == (batch["caption"], batch["label"].tolist())
    counts = batch["label"].bincount(minlength=6).tolist()
    assert all(abs(count - 160 / 6) < 4 * (160 * 5 / 36) ** 0.5 for count in counts), counts
    assert {batch["caption"].count(text) > 0 for texts in data.captions for text in texts} == {True}


def test_captions_of_edits_are_their_instructions(data):
    assert data.all_captions() == [text for texts in data.captions for text in texts]


def test_edit_depends_on_seed_epoch_and_index_only(data):
    whole = data.batch(SAMPLES)
    for i in (0, 41, 159):
        alone = data.batch([SAMPLES[i]])
        assert torch.equal(alone["image"][0], whole["image"][i])
        assert alone["caption"][0] == whole["caption"][i]
    again = pickle.loads(pickle.dumps(data)).batch(SAMPLES)
    assert torch.equal(again["image"], whole["image"])
    first, second = whole["label"][:40], whole["label"][40:80]
    other = EditDataset(data.dataset, data.edits, seed=1).batch(SAMPLES)["label"]
    assert not torch.equal(first, second)
    assert not torch.equal(other, whole["label"])


def test_edits_of_cropped_images(data):
    cropped = AugmentedDataset(Synthetic(num=4, size=16), training=True, crop=RandomCrop(8))
    pairs = EditDataset(cropped, data.edits)
    assert pairs.changed_by == ["augmentation.crop", "degradation.edits"]
    assert data.changed_by == ["degradation.edits"]
    batch = pairs.batch([(0, 0), (0, 1)])
    assert batch["source"].shape == batch["image"].shape == (2, 1, 8, 8)
    assert (pairs.shape, len(pairs), pairs.unlabelled) == ((1, 8, 8), 4, 0)


def test_edits_report_errors_in_one_line():
    with pytest.raises(ConfigError, match=r"degradation.edits=\[\]: expected one edit or more"):
        EditDataset(Synthetic(num=4), [])
    with pytest.raises(ConfigError, match="an edit has no texts; expected one instruction"):
        Edit([], mirror)
    with pytest.raises(ConfigError, match="quarter turn of an image of 4x6 pixels; expected square images"):
        rotate(torch.zeros(1, 4, 6))
    assert rotate(torch.zeros(1, 4, 6), 2).shape == (1, 4, 6)
