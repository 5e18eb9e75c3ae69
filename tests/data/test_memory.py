import json
from collections import Counter

import pytest
import torch

from ldm.config import build
from ldm.data.memory import InMemoryDataset, flip_where, iter_bytes, read_captions
from ldm.data.synthetic import SHAPES, Synthetic
from ldm.errors import UserError

CAPTIONS = {"left": ["one", "two", "three"], "right": ["four"]}


def make(flip=False, seed=0, captions=CAPTIONS):
    images = torch.arange(4 * 2 * 3, dtype=torch.uint8).reshape(4, 1, 2, 3) * 11
    return InMemoryDataset("tiny", images, torch.tensor([0, 1, 0, 1]), captions, seed, flip)


def test_in_memory_batch():
    data = make()
    batch = data.batch([(0, 1), (5, 3), (0, 0)])
    assert torch.equal(batch["image"], data.images[[1, 3, 0]] / 127.5 - 1)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].tolist() == [1, 1, 0]
    assert batch["caption"][:2] == ["four", "four"]
    assert (batch["index"], batch["epoch"]) == ([1, 3, 0], [0, 5, 0])
    assert not batch["flip"].any()


def test_in_memory_pixels_span_minus_one_to_one():
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    data = InMemoryDataset("ends", images, torch.tensor([0, 1]), CAPTIONS)
    assert data.batch([(0, 0), (0, 1)])["image"].flatten().tolist() == [-1, 1]


def test_in_memory_item_equals_row_of_first_epoch():
    data = make()
    batch = data.batch([(0, i) for i in range(4)])
    for i in range(4):
        sample = data[i]
        assert torch.equal(sample["image"], batch["image"][i])
        assert (sample["caption"], sample["label"], sample["index"]) == (batch["caption"][i], int(batch["label"][i]), i)
    assert data[-1]["index"] == 3
    with pytest.raises(IndexError, match="tiny has 4 images, index 4 is out of range"):
        data[4]


def test_in_memory_captions_are_keyed_and_all_used():
    data = make()
    drawn = [data.caption(epoch, 0) for epoch in range(900)]
    assert drawn == [make().caption(epoch, 0) for epoch in range(900)]
    assert drawn != [make(seed=1).caption(epoch, 0) for epoch in range(900)]
    assert drawn != [data.caption(epoch, 2) for epoch in range(900)]
    assert all(abs(n - 300) < 70 for n in Counter(drawn).values())
    assert {data.caption(epoch, 1) for epoch in range(9)} == {"four"}


def test_in_memory_missing_caption_or_label_is_empty_condition():
    images, labels = torch.zeros(4, 1, 2, 3, dtype=torch.uint8), torch.tensor([0, -1, 1, -1])
    data = InMemoryDataset("x", images, labels, CAPTIONS)
    assert (data.uncaptioned, data.unlabelled) == (2, 2)
    assert {data.caption(epoch, 1) for epoch in range(9)} == {""}
    assert data.batch_metadata([(0, i) for i in range(4)])["label"].tolist() == [0, -1, 1, -1]
    data = InMemoryDataset("x", images, labels.clamp(min=0), CAPTIONS, texts=[["a"], [], [""], ["b", "c"]])
    assert (data.uncaptioned, data.unlabelled) == (2, 0)
    assert [{data.caption(epoch, i) for epoch in range(9)} for i in range(4)] == [{"a"}, {""}, {""}, {"b", "c"}]
    assert data.all_captions() == ["a", "", "b", "c"]
    assert make().all_captions() == ["one", "two", "three", "four"]
    with pytest.raises(ValueError, match="captions of 1 samples, 4 labels"):
        InMemoryDataset("x", images, labels, CAPTIONS, texts=[["a"]])


def test_require_labels_rejects_unlabelled_samples():
    images = torch.zeros(4, 1, 2, 3, dtype=torch.uint8)
    build.require_labels(make(), make())
    with pytest.raises(UserError, match="2 of 8 samples have no label, and a classifier needs one for each"):
        build.require_labels(make(), InMemoryDataset("x", images, torch.tensor([0, -1, 1, -1]), CAPTIONS))


def test_in_memory_flip_mirrors_half_and_reports_it():
    data = make(flip=True)
    batch = data.batch([(epoch, i) for epoch in range(100) for i in range(4)])
    plain = data.pixels(batch["index"])
    flip = batch["flip"]
    assert 150 < flip.sum() < 250
    assert torch.equal(batch["image"][~flip], plain[~flip])
    assert torch.equal(batch["image"][flip], plain[flip].flip(-1))
    assert torch.equal(data.batch([(1, 2)])["image"], batch["image"][6:7]), "the same in any company"


def test_in_memory_fingerprint_depends_on_pixels_labels_and_classes():
    data = make()
    assert data.fingerprint == make(flip=True, seed=1, captions={"left": ["x"], "right": ["y"]}).fingerprint
    other = make()
    other.images[0, 0, 0, 0] += 1
    assert other.fingerprint != data.fingerprint
    relabelled = make()
    relabelled.labels[0] = 1
    assert relabelled.fingerprint != data.fingerprint


@pytest.mark.parametrize("rows", [None, torch.tensor([4, 0, 4, 3, 2])])
def test_bytes_are_read_in_parts(rows):
    images = torch.arange(10, dtype=torch.uint8).reshape(5, 2)
    whole = images if rows is None else images[rows]
    parts = list(iter_bytes(images, rows, size=2))
    assert parts == [bytes(whole[i : i + 2].flatten().tolist()) for i in (0, 2, 4)]


def test_in_memory_rejects_mismatched_arrays():
    images, labels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"x: expected images .*, got torch\.float64 \(2, 1, 4, 4\)"):
        InMemoryDataset("x", images.double(), labels, CAPTIONS)
    with pytest.raises(ValueError, match=r", 1$"):
        InMemoryDataset("x", images, labels[:1], CAPTIONS)
    with pytest.raises(ValueError, match="labels reach from 0 to 2 but 2 classes"):
        InMemoryDataset("x", images, labels * 2, CAPTIONS)
    with pytest.raises(ValueError, match="no caption for right"):
        InMemoryDataset("x", images, labels, {"left": ["one"], "right": []})


def test_in_memory_fields_need_neither_classes_nor_captions():
    fields = torch.rand(6, 2, 3, 5) * 2 - 1
    data = InMemoryDataset("x", fields, flip=True)
    assert (data.shape, data.classes, data.captions, data.unlabelled) == ((2, 3, 5), [], [], 6)
    batch = data.batch([(0, 4), (1, 2), (2, 2), (3, 2)])
    assert torch.equal(data.pixels([4, 2]), fields[[4, 2]])
    assert torch.equal(batch["image"], flip_where(fields[[4, 2, 2, 2]], batch["flip"]))
    assert batch["label"].tolist() == [-1] * 4
    assert batch["caption"] == [""] * 4
    assert InMemoryDataset("x", torch.zeros(2, 1, 7)).shape == (1, 7)
    told = InMemoryDataset("x", fields[:2], texts=[["a", "b"], ["b", "c"]])
    assert (told.classes, told.captions) == ([], [["a", "b", "c"]])
    sorted_ = InMemoryDataset("x", fields[:2], torch.tensor([1, 0]), {"p": [], "q": []})
    assert (sorted_.classes, sorted_.captions) == (["p", "q"], [])
    assert sorted_.batch([(0, 0), (0, 1)]).items() >= {"caption": ["", ""]}.items()


def test_read_captions_preserves_text(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"a": ["it's 3, [x] = ü 😀"], "b": ["null"]}), encoding="utf-8")
    assert read_captions(tmp_path / "c.json") == {"a": ["it's 3, [x] = ü 😀"], "b": ["null"]}


@pytest.mark.parametrize("text", ['{"a": "b"}', "[]", '{"a": ["b"', "\xff"])
def test_read_captions_rejects_other_formats(text, tmp_path):
    (tmp_path / "c.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="expected a JSON object of the form"):
        read_captions(tmp_path / "c.json")


def test_synthetic_shapes_are_round_and_central_at_any_height_and_width():
    data = Synthetic(num=200, size=[24, 40])
    assert data.shape == (1, 24, 40)
    discs = data.images[data.labels == 0, 0] > 80
    tall, wide = (discs.any(axis).sum(1) for axis in (2, 1))
    assert (tall - wide).abs().max() <= 1
    for side, lines in ((24, discs.any(2)), (40, discs.any(1))):
        middle = (lines * torch.arange(0.5, side)).sum(1) / lines.sum(1) / side
        assert 0.38 < middle.min() < 0.45
        assert 0.55 < middle.max() < 0.62
    assert data.fingerprint != Synthetic(num=200, size=[40, 24]).fingerprint
    assert Synthetic(num=3, size=[8, 8]).fingerprint == Synthetic(num=3, size=8).fingerprint
    for size in ([8], [8, 8, 8], [8, 0], [8, 8.0]):
        with pytest.raises(UserError, match=r"size=\[8.*: expected 1 px or more, one number for squares or \["):
            Synthetic(size=size)


def test_synthetic_classes_and_splits_differ():
    data, test = Synthetic(), Synthetic("test")
    assert data.images.shape == (512, 1, 32, 32)
    assert data.classes == list(SHAPES)
    assert data.fingerprint == Synthetic().fingerprint != test.fingerprint
    assert all(name in text for name, texts in zip(data.classes, data.captions, strict=True) for text in texts)
    means = torch.stack([data.images[data.labels == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.images.flatten(1).float(), means).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.5, "shapes are told apart by the mean image alone"
    assert Synthetic(num=7, size=16).images.shape == (7, 1, 16, 16)
    with pytest.raises(ValueError, match="split='val'"):
        Synthetic("val")
    for option, said in (({"num": 0}, "num=0: expected at least one image"), ({"size": 0}, "size=0: expected ")):
        with pytest.raises(ValueError, match=said):
            Synthetic(**option)
