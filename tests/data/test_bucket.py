import inspect
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data import bucket
from ldm.data.bucket import BucketedDataset, BucketedFolder, BucketStream, bucket_shapes, nearest_bucket
from ldm.data.folder import ImageFolder
from ldm.data.latents import LatentDataset, encode_latents
from ldm.data.stream import BatchDataset
from ldm.errors import UserError


def test_bucket_shapes_have_equal_area():
    found = bucket_shapes(1024, 64, 4.0)
    assert (1024, 1024) in found
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 and max(h / w, w / h) <= 4 for h, w in found)
    assert all(h * w > 0.85 * 1024**2 for h, w in found)
    assert {(w, h) for h, w in found} == set(found)
    assert bucket_shapes(64, 64) == [(64, 64)]
    assert [w / h for h, w in found] == sorted(w / h for h, w in found)
    assert bucket_shapes(8, 8, 1.0) == [(8, 8)]
    assert {(4, 12), (12, 4)} <= {*bucket_shapes(8, 2, 3.0)}  # 4 x 16 would be wider
    with pytest.raises(ValueError, match="side=32"):
        bucket_shapes(32, 64)


def test_nearest_bucket_uses_log_ratio():
    some = [(2, 1), (1, 1), (1, 2)]
    assert [nearest_bucket(size, some) for size in ((300, 100), (100, 99), (400, 600), (100, 190))] == [0, 1, 2, 2]
    assert nearest_bucket((140, 100), some) == 1, "by the logarithm: 1.4 is nearer to 1 than to 2"
    assert nearest_bucket((100, 140), some) == 1
    assert [nearest_bucket((7, 7), shapes) for shapes in ([(1, 1), (2, 2)], [(2, 2), (1, 1)])] == [1, 0]


BUCKETS = tuple([0] * 20 + [1] * 7 + [2] * 2)


def stream_of(buckets, batch, **options):
    return BucketStream(**{"length": len(buckets), "batch": batch, "buckets": buckets, **options})


def rows(stream):
    return [part.samples for part in stream]


def test_bucket_batches_are_single_bucket_and_balanced():
    batches = rows(stream_of(BUCKETS, 4, steps=290))
    assert all(len({BUCKETS[i] for _, i in at}) == 1 for at in batches)
    seen = Counter(i for at in batches for _, i in at)
    assert set(seen) == set(range(29))
    assert all(38 <= n <= 41 for n in seen.values()), (
        "40 passes: every sample as often as any other, however small its bucket"
    )
    assert min(e for at in batches for e, _ in at) == 0
    for epoch in (0, 1):
        first = [i for at in batches for e, i in at if e == epoch and i < 20]
        assert sorted(first) == list(range(20)), "a bucket's pass has each of its samples once"


def test_bucket_stream_repeats_small_buckets():
    batches = rows(stream_of(tuple(range(30)), 4, steps=60))
    assert all(len({i for _, i in at}) == 1 for at in batches)
    assert set(Counter(at[0][1] for at in batches).values()) == {2}


@pytest.mark.parametrize(("size", "batch"), [(3, 2), (3, 3), (2, 5), (5, 3)])
def test_bucket_stream_takes_each_sample_once_in_each_epoch(size, batch):
    """Also where a batch begins in one epoch and ends in a later one."""
    batches = rows(stream_of((0,) * size, batch, steps=2 * size))
    assert sorted(sample for at in batches for sample in at) == [(e, i) for e in range(2 * batch) for i in range(size)]


def test_bucket_stream_is_function_of_step():
    stream = stream_of(BUCKETS, 4, steps=60)
    assert rows(stream_of(BUCKETS, 4, steps=60, start=33)) == rows(stream)[33:]
    assert rows(stream_of(BUCKETS, 4, steps=60, seed=1)) != rows(stream)
    for step in (0, 17, 59):
        ranks = [stream_of(BUCKETS, 4, steps=60, rank=r, world=2).batch_at(step) for r in range(2)]
        assert [at for part in ranks for at in part.samples] == stream.batch_at(step).samples
        assert [p for part in ranks for p in part.position] == [0, 1, 2, 3]
    order = [BUCKETS[at[0][1]] for at in rows(stream)]
    assert order[:7] != sorted(order[:7]) or order[7:14] != sorted(order[7:14]), "buckets come in turn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": ()}, "empty"),
        ({"length": 3}, "29 buckets for 3 samples"),
        ({"batch": 1, "world": 2}, "batch=1"),
        ({"start": 9}, "start=9"),
    ],
)
def test_bucket_stream_rejects_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        stream_of(**{"buckets": BUCKETS, "batch": 2, "steps": 8, **options})


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Twelve pictures, tall, square and wide in turn, the left half red and each of its own level, and one that lies on
    its side.
    """
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(12):
        size = [(40, 80), (60, 60), (90, 40)][i % 3]
        picture = Image.new("RGB", size)
        picture.paste((100 + 10 * i, 0, 0), (0, 0, size[0] // 2, size[1]))
        picture.save(root / f"{i:02d}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "lying.jpg", exif=exif)
    return root


def test_bucketed_images_have_bucket_shape(pictures):
    square = BucketedFolder(pictures, size=32, test_fraction=0)
    data = square.to_buckets(8)
    assert square.batch([(0, 0), (0, 1)])["image"].shape == (2, 3, 32, 32), "a first stage is trained on squares"
    assert data.shapes == [(40, 24), (32, 32), (24, 40)]
    assert data.buckets == (*[0, 1, 2] * 4, 0), "the last is wide in its file, and tall as it is to be seen"
    loader = DataLoader(BatchDataset(data), sampler=data.stream(4, 9), batch_size=None, num_workers=0)
    seen = set()
    for batch in loader:
        height, width = batch["image"].shape[2:]
        seen.add((height, width))
        assert (height, width) == data.shapes[data.buckets[batch["index"][0]]]
        for image, i, flip in zip(batch["image"], batch["index"], batch["flip"], strict=True):
            if i < 12:
                left = image[0, :, : width // 2 - 1] if not flip else image[0, :, -(width // 2 - 1) :]
                assert torch.allclose(left, torch.tensor((100 + 10 * i) / 127.5 - 1), atol=0.03)
    assert seen == set(data.shapes)
    with pytest.raises(ValueError, match="2 shapes cannot be stacked"):
        data.batch([(0, 0), (0, 1)])


def test_bucketed_images_are_used_once_per_epoch(pictures):
    data = BucketedFolder(pictures, size=32, test_fraction=0).to_buckets(8)
    assert sum(len(part) for part in data.parts) == len(data) == 13
    found = [
        (bucket, row)
        for i in range(13)
        for bucket, (row,) in [(lambda one: (one[0], one[1].tolist()))(data.locate([i]))]
    ]
    assert len(set(found)) == 13
    passes = Counter(one for step in range(40) for one in data.stream(2, 40).batch_at(step).samples)
    assert max(passes.values()) == 1, "no (epoch, index) comes twice"
    assert {i for e, i in passes if e == 0} == set(range(13))


def test_bucketed_latents_match_images(pictures):
    """A first stage whose moments are the pixels: what a training gets is what the batch of images holds."""

    class Whole(torch.nn.Module):
        def posterior(self, image):
            return SimpleNamespace(moments=image)

    data = BucketedFolder(pictures, size=32, test_fraction=0).to_buckets(8)
    latents = LatentDataset(data, data.joined([encode_latents(Whole(), part) for part in data.parts]))
    for step in range(6):
        at = latents.stream(4, 6).batch_at(step).samples
        assert torch.allclose(latents.batch(at)["moments"], data.batch(at)["image"], atol=1e-3)
    with pytest.raises(ValueError, match="2 shapes"):
        latents.batch([(0, 0), (0, 1)])


def test_bucketed_folder_fingerprint_depends_on_all_pixels(pictures):
    """Also by what lies outside their middle squares."""
    before, square = BucketedFolder(pictures, size=32), ImageFolder(pictures, size=32).content
    os.utime(pictures / "02.png", (1, 1))
    assert BucketedFolder(pictures, size=32, content_hash=before.content).content == before.content, (
        "touched, not changed"
    )
    image = Image.open(pictures / "02.png")
    image.putpixel((89, 0), (1, 2, 3))
    image.save(pictures / "02.png")
    assert ImageFolder(pictures, size=32).content == square, "it is not seen there"
    with pytest.raises(UserError, match="not those of this run"):
        BucketedFolder(pictures, size=32, content_hash=before.content)


def test_bucketed_folder_reports_errors(pictures):
    with pytest.raises(UserError, match=r"max_aspect_ratio=0\.5"):
        BucketedFolder(pictures, max_aspect_ratio=0.5)
    with pytest.raises(UserError, match="size=16: expected 64 or more"):
        BucketedFolder(pictures, size=16).to_buckets(64)
    with pytest.raises(ValueError, match=r"parts of \[1\] images do not fit buckets of \[2\]"):
        BucketedDataset(None, [[0]], [0, 0])


def test_buckets_option_lists_every_default():
    option = yaml.safe_load((Path(bucket.__file__).parents[2] / "conf" / "data" / "buckets.yaml").read_text())
    parameters = inspect.signature(BucketedFolder).parameters
    assert (option.pop("_target_"), option.pop("path")) == ("ldm.data.bucket.BucketedFolder", "???")
    assert option == {name: one.default for name, one in parameters.items() if name != "path"}
