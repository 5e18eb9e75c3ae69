import io
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from ldm.data import lazy
from ldm.data.lazy import LazyDataset
from ldm.data.standard_datasets import FileSource
from ldm.errors import UserError


class Painted(FileSource):
    """Images of their number's grey level, but those at `broken`."""

    broken = ()

    def image(self, i):
        file = io.BytesIO()
        if i not in self.broken:
            Image.new("L", (16, 16), i).save(file, "png")
        return file


def source(captions=(), labels=(0,) * 10):
    paths = [Path("pictures", f"{i}.png") for i in range(10)]
    return Painted(paths, captions, labels, {"x": ["y"], "z": ["w"]}, Path("pictures"))


def test_file_source_counts_missing_labels_and_captions():
    labelled = source(labels=[0, -1, 1, 0, 0, 0, 0, 0, 0, 0])
    assert labelled.unlabelled.tolist() == labelled.uncaptioned.tolist() == [False, True] + [False] * 8
    captioned = source(captions=[["a"], [], [""], ["", "b"], *[["c"]] * 6])
    assert captioned.uncaptioned.tolist() == [False, True, True] + [False] * 7
    assert not captioned.unlabelled.any()
    assert (labelled.captioned, captioned.captioned) == (False, True)


def test_quarantined_images_are_left_out_up_to_a_fifth(monkeypatch):
    def made(*faults):
        monkeypatch.setattr(lazy, "quarantined_rows", lambda path: {f"{path}/{i}.png": "broken" for i in faults})
        return LazyDataset("x", source(), range(10), 16, 3, None)

    whole, part = made(), made(7, 2)
    assert whole.rows.tolist() == [*range(10)]
    assert part.rows.tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    said = source().identity, source().identity + "['pictures/2.png', 'pictures/7.png']"
    assert [data.content for data in (whole, part)] == [sha256(text.encode()).hexdigest()[:16] for text in said]
    assert "quarantined" not in whole.summary
    assert part.summary.endswith(", 2 quarantined")
    with pytest.raises(UserError, match="x: 3 of 10 images are quarantined, more than 20%"):
        made(7, 2, 3)


def test_lazy_items_are_rows_of_first_epoch():
    data = LazyDataset("x", source(), [3, 4, 9], 16, 1, None, flip=False)
    assert [data[i]["index"] for i in (0, 1, 2, -3, -2, -1)] == [0, 1, 2] * 2
    assert [round((float(data[i]["image"].mean()) + 1) * 127.5) for i in range(3)] == [3, 4, 9]
    for outside in (3, -4):
        with pytest.raises(IndexError, match=f"x has 3 images, index {outside} is out of range"):
            data[outside]


def test_lazy_fingerprint_has_other_crops_than_the_centre():
    for crop, parts in (("centre", []), ("adm", ["adm"])):
        text = repr((source().identity, 16, 1, [3, 4], *parts))
        data = LazyDataset("x", source(), [3, 4], 16, 1, None, crop=crop)
        assert data.fingerprint == f"lazydataset-{sha256(text.encode()).hexdigest()[:16]}"


def test_lazy_dataset_gives_up_when_too_many_images_are_unreadable(monkeypatch):
    """Of ten images three may be: as many as there are, not as often as they are asked for."""
    monkeypatch.setattr(lazy, "MAX_CONSECUTIVE_FAILURES", 2)
    monkeypatch.setattr(lazy, "MAX_UNREADABLE", 0.3)
    files = source()
    files.broken = (0, 2, 4, 6, 8)
    data = LazyDataset("x", files, range(10), 16, 1, None)
    assert [int(data.decode(i)[0].max()) for i in (0, 2, 4, 0, 2, 4, 5)] == [1, 3, 5, 1, 3, 5, 5]
    with pytest.raises(UserError, match=r"x: 4 of 10 images could not be read so far, the last is pictures/6\.png"):
        data.decode(6)


def test_all_captions_are_those_of_the_rows_or_else_of_the_classes():
    captioned = source(captions=[["a"], ["b", "a"], ["c"], *[["d"]] * 7])
    assert LazyDataset("x", captioned, [0, 1, 2], 16, 1, None).all_captions() == ["a", "b", "c"]
    assert LazyDataset("x", source(), [0, 1], 16, 1, None).all_captions() == ["y", "w"]
