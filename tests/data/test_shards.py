import io
import json
import logging
import os
import pickle
import tarfile

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.conditioner.size import SIZE_KEYS
from ldm.data import shards
from ldm.data.shards import TarShardDataset, expand_pattern
from ldm.data.stream import BatchDataset, BatchStream
from ldm.errors import UserError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def png(colour, size=(20, 20), kind="png"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def shard(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i, **others):
    return {f"{i:06d}.png": png((i, 0, 0)), **{f"{i:06d}.{ending}": text for ending, text in others.items()}}


@pytest.fixture
def folder(tmp_path):
    """Three shards of ten captioned samples."""
    for s in range(3):
        files = {}
        for i in range(10 * s, 10 * s + 10):
            files |= sample(i, txt=f"picture {i}\nnumber {i}".encode(), json=b'{"caption": "not this"}')
        shard(tmp_path / "data" / f"x-{s:03d}.tar", files)
    return tmp_path / "data"


def red(batch):
    return ((batch["image"][:, 0] + 1) * 127.5).mean((1, 2)).round().int().tolist()


def test_shards_support_random_access(folder):
    data = TarShardDataset(folder, size=16, test_fraction=0.0)
    assert len(data) == 30
    batch = data.batch([(0, 25), (3, 0), (3, 11)])
    assert red(batch) == [25, 0, 11]
    assert batch["image"].shape == (3, 3, 16, 16)
    assert all(text in (f"picture {i}", f"number {i}") for text, i in zip(batch["caption"], (25, 0, 11), strict=True))
    assert {data.caption(epoch, 7) for epoch in range(20)} == {"picture 7", "number 7"}
    assert data.classes == ["image"]
    assert "picture 7" in data.captions[0]
    assert set(data.batch_metadata([(0, 1)])) == set(batch) - {"image", *SIZE_KEYS}


def test_shards_are_independent_of_workers_and_ranks(folder):
    data, stream = TarShardDataset(folder, size=16, test_fraction=0.0), BatchStream(30, 8, steps=5)
    plain = [BatchDataset(data)[part] for part in stream]
    loader = DataLoader(
        BatchDataset(TarShardDataset(folder, size=16, test_fraction=0.0)),
        sampler=stream,
        batch_size=None,
        num_workers=2,
    )
    for one, other in zip(plain, loader, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert one["caption"] == other["caption"]
    halves = [BatchDataset(data)[BatchStream(30, 8, 5, rank=r, world=2).batch_at(3)] for r in range(2)]
    assert torch.equal(torch.cat([half["image"] for half in halves]), plain[3]["image"])
    assert sorted(i for part in BatchStream(30, 10, 3) for _, i in part.samples) == list(range(30))
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.batch([(2, 9)])["image"], data.batch([(2, 9)])["image"])
    flips = data.batch([(epoch, 3) for epoch in range(40)])["flip"]
    assert 5 < flips.sum() < 35


def test_shards_split_by_name(folder):
    train, test = (TarShardDataset(folder, split, size=16, test_fraction=0.3) for split in ("train", "test"))
    seen = [set(red(data.batch([(0, i) for i in range(len(data))]))) for data in (train, test)]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(30))
    assert train.fingerprint != test.fingerprint
    assert train.content == test.content
    part = TarShardDataset(folder / "x-{001..002}.tar", "test", size=16, test_fraction=0.3)
    assert set(red(part.batch([(0, i) for i in range(len(part))]))) == {i for i in seen[1] if i >= 10}


def test_shards_without_labels_have_one_class_unless_named_and_captioned(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for text, classes, label in ((None, {"image": [""]}, 0), (b"a pet", ["cat", "dog"], -1)):
        path = shard(tmp_path / f"{label}.tar", sample(0, **({} if text is None else {"txt": text})))
        source = shards.TarSource((path,), tmp_path / "names.txt")
        assert (list(source.classes), source.label(0)) == (list(classes), label)
        assert source.captioned == (text is not None)
        assert source.unlabelled.tolist() == [label < 0]


def test_index_has_files_alone_that_are_not_hidden(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("a.png", tarfile.REGTYPE), ("._b.png", tarfile.REGTYPE), ("c.png", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    assert shards.build_index([tmp_path / "x.tar"])[:, 2].tolist() == [512]


def test_shards_classes_by_number_and_name(tmp_path):
    files = {}
    for i in range(6):
        files |= sample(i, cls=str(i % 3).encode())
    path = shard(tmp_path / "c.tar", files)
    data = TarShardDataset(path, size=16, test_fraction=0.0)
    assert data.batch([(0, i) for i in range(6)])["label"].tolist() == [0, 1, 2, 0, 1, 2]
    assert data.classes == ["0", "1", "2"]
    (tmp_path / "names.txt").write_text("cat\nsea_lion\ndog\n")
    data = TarShardDataset(path, size=16, test_fraction=0.0, names=tmp_path / "names.txt")
    assert {data.caption(epoch, 1) for epoch in range(20)} == {
        "sea lion",
        "a photo of sea lion",
        "a picture of sea lion",
    }
    (tmp_path / "names.txt").write_text("cat\n")
    with pytest.raises(UserError, match="1 classes, but labels reach to 2"):
        TarShardDataset(path, names=tmp_path / "names.txt")


def test_shards_captions_in_json(tmp_path):
    files = {
        **sample(0, json=json.dumps({"caption": ["a", " b  c "]}).encode()),
        **sample(1),
        **sample(2, json=b"{broken"),
    }
    data = TarShardDataset(shard(tmp_path / "j.tar", files), size=16, test_fraction=0.0)
    assert [data.source.texts(i) for i in range(3)] == [["a", "b c"], [], []]
    assert {data.caption(epoch, 0) for epoch in range(20)} == {"a", "b c"}
    bare = TarShardDataset(shard(tmp_path / "bare.tar", sample(1)), size=16, test_fraction=0.0)
    assert bare.caption(0, 0) == ""


def test_shards_count_uncaptioned_samples(tmp_path):
    files = {
        **sample(0, txt=b"one"),
        **sample(1),
        **sample(2, txt=b" \n"),
        **sample(3, txt=b"", json=b'{"caption": [{"raw": "four"}]}'),
    }
    data = TarShardDataset(shard(tmp_path / "m.tar", files), size=16, test_fraction=0.0)
    assert [{data.caption(epoch, i) for epoch in range(9)} for i in range(4)] == [{"one"}, {""}, {""}, {"four"}]
    assert ", 2 without a caption" in data.summary
    assert "label" not in data.summary
    labelled = {**sample(0, cls=b"1"), **sample(1, cls=b"-1"), **sample(2, json=b'{"id": 3}')}
    data = TarShardDataset(shard(tmp_path / "l.tar", labelled), size=16, test_fraction=0.0)
    assert data.batch_metadata([(0, i) for i in range(3)])["label"].tolist() == [1, -1, -1]
    assert [data.caption(0, 1), data.caption(0, 2)] == ["", ""]
    assert {data.caption(epoch, 0) for epoch in range(30)} == {"1", "a photo of 1", "a picture of 1"}
    assert ", 2 without a caption (the empty one stands for it), 2 without a label" in data.summary
    bare = TarShardDataset(shard(tmp_path / "bare.tar", sample(1)), size=16, test_fraction=0.0)
    assert ", 1 without a caption" in bare.summary


def test_shards_identity_is_independent_of_location(folder, tmp_path):
    before = TarShardDataset(folder, size=16)
    folder.rename(tmp_path / "elsewhere")
    after = TarShardDataset(tmp_path / "elsewhere", size=16, content_hash=before.content)
    assert (after.content, after.fingerprint) == (before.content, before.fingerprint)


def test_shards_replace_damaged_image_by_next(tmp_path, caplog):
    files = {**sample(0), "000001.png": b"no image", **sample(2)}
    data = TarShardDataset(shard(tmp_path / "d.tar", files), size=16, test_fraction=0.0)
    with caplog.at_level(logging.WARNING):
        assert red(data.batch([(0, 0), (0, 1), (0, 2)])) == [0, 2, 2]
    assert "d.tar at byte" in caplog.text
    broken = TarShardDataset(shard(tmp_path / "e.tar", {"1.png": b"", "2.png": b""}), size=16, test_fraction=0.0)
    with pytest.raises(UserError, match=r"images in a row cannot be read, from .*e\.tar"):
        broken.batch([(0, 0)])


def test_shards_limit_open_files(tmp_path):
    """A thousand shards and more, where a process may open a thousand files: those read last stay open."""
    for i in range(300):
        shard(tmp_path / "many" / f"{i:03d}.tar", sample(i % 200))
    data = TarShardDataset(tmp_path / "many", size=16, test_fraction=0.0)
    before = len(os.listdir("/proc/self/fd"))
    assert (
        len({data.caption(0, i) for i in range(300)} | {data.source.image(i).getbuffer().nbytes for i in range(300)})
        > 1
    )
    assert len(os.listdir("/proc/self/fd")) - before <= 256


def test_shards_index_is_built_once(folder, monkeypatch):
    first = TarShardDataset(folder, size=16)
    monkeypatch.setattr(shards, "build_index", None)
    assert len(TarShardDataset(folder, size=32)) == len(first)
    os.utime(folder / "x-001.tar", (1, 1))
    with pytest.raises(TypeError):
        TarShardDataset(folder)


def test_shards_reject_changed_content(folder):
    content = TarShardDataset(folder, size=16).resolved_config["content_hash"]
    assert TarShardDataset(folder, "test", size=16, test_fraction=0.5, content_hash=content)
    shard(folder / "x-000.tar", sample(99))
    with pytest.raises(UserError, match=f"not those of this run .*then {content}"):
        TarShardDataset(folder, size=16, content_hash=content)


def test_shards_download_urls_once(folder, tmp_path):
    pattern = f"file://{folder}/x-{{000..001}}.tar"
    data = TarShardDataset(pattern, size=16, test_fraction=0.0)
    assert red(data.batch([(0, 19)])) == [19]
    for path in folder.iterdir():
        path.unlink()
    assert red(TarShardDataset(pattern, size=16, test_fraction=0.0).batch([(0, 4)])) == [4]
    assert not list((tmp_path / "cache").rglob("*.part"))
    with pytest.raises(UserError, match=r"path=file://.*x-002\.tar: cannot be fetched"):
        TarShardDataset(f"file://{folder}/x-002.tar")


def test_expand_pattern():
    assert expand_pattern("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_pattern("https://host/a.tar") == ["https://host/a.tar"]


def test_shards_report_errors_in_one_line(folder, tmp_path):
    whole = (folder / "x-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.tar").write_text("not a tar at all")
    (tmp_path / "empty").mkdir()
    shard(tmp_path / "text.tar", {"1.txt": b"x"})
    shard(tmp_path / "label.tar", sample(1, cls=b"cat"))
    said = {
        "cut.tar": "not a whole",
        "no.tar": "not a whole",
        "empty": "no .tar",
        "text.tar": "no image in",
        "label.tar": "b'cat', not a number",
    }
    for name, why in {**said, "gone.tar": "no such file"}.items():
        with pytest.raises(UserError, match=why) as error:
            TarShardDataset(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    for option in ({"split": "val"}, {"size": 8}, {"channels": 2}):
        with pytest.raises(UserError, match=next(iter(option))):
            TarShardDataset(folder, **option)
    with pytest.raises(UserError, match="no sample in this split"):
        TarShardDataset(folder, "test", test_fraction=0.0)
