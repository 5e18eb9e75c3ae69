import io
from collections import Counter

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data.bucket import Bucketed, BucketStream, nearest, shapes, sizes_of
from ldm.data.lazy import Lazy
from ldm.data.stream import Batched


def test_shapes_are_multiples_of_about_one_area():
    found = shapes(1024, 64, 4.0)
    assert (1024, 1024) in found
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 and max(h / w, w / h) <= 4 for h, w in found)
    assert all(h * w > 0.85 * 1024**2 for h, w in found)
    assert {(w, h) for h, w in found} == set(found)
    assert shapes(64, 64) == [(64, 64)]
    assert [w / h for h, w in found] == sorted(w / h for h, w in found)
    with pytest.raises(ValueError, match="side=32"):
        shapes(32, 64)


def test_the_nearest_shape_is_that_of_the_nearest_ratio():
    some = [(2, 1), (1, 1), (1, 2)]
    assert [nearest(size, some) for size in ((300, 100), (100, 99), (400, 600), (100, 190))] == [0, 1, 2, 2]
    assert nearest((140, 100), some) == 1, "by the logarithm: 1.4 is nearer to 1 than to 2"
    assert nearest((100, 140), some) == 1


BUCKETS = tuple([0] * 20 + [1] * 7 + [2] * 2)


def rows(stream):
    return [part.at for part in stream]


def test_batches_are_of_one_bucket_and_each_has_its_share():
    batches = rows(BucketStream(BUCKETS, 4, steps=290))
    assert all(len({BUCKETS[i] for _, i in at}) == 1 for at in batches)
    seen = Counter(i for at in batches for _, i in at)
    assert set(seen) == set(range(29))
    assert all(38 <= n <= 41 for n in seen.values()), "40 passes: every sample as often as any other, however small its bucket"
    for place in (0, 1):
        first = [i for at in batches for e, i in at if e == place and i < 20]
        assert sorted(first) == list(range(20)), "a bucket's pass has each of its samples once"


def test_buckets_smaller_than_a_batch():
    batches = rows(BucketStream(tuple(range(30)), 4, steps=60))
    assert all(len({i for _, i in at}) == 1 for at in batches)
    assert set(Counter(at[0][1] for at in batches).values()) == {2}


def test_a_pure_function_of_the_step():
    stream = BucketStream(BUCKETS, 4, steps=60)
    assert rows(BucketStream(BUCKETS, 4, steps=60, start=33)) == rows(stream)[33:]
    assert rows(BucketStream(BUCKETS, 4, steps=60, seed=1)) != rows(stream)
    for step in (0, 17, 59):
        ranks = [BucketStream(BUCKETS, 4, 60, rank=r, world=2).at(step) for r in range(2)]
        assert [at for part in ranks for at in part.at] == stream.at(step).at
        assert [p for part in ranks for p in part.position] == [0, 1, 2, 3]
    order = [BUCKETS[at[0][1]] for at in rows(stream)]
    assert order[:7] != sorted(order[:7]) or order[7:14] != sorted(order[7:14]), "buckets come in turn"


@pytest.mark.parametrize(
    ("options", "message"), [({"buckets": ()}, "empty"), ({"batch": 1, "world": 2}, "batch=1"), ({"start": 9}, "start=9")]
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        BucketStream(**{"buckets": BUCKETS, "batch": 2, "steps": 8, **options})


class Pictures:
    """Twelve pictures, tall, square and wide in turn, the left half red."""

    identity, place, classes = "pictures", "pictures", {"image": ["x"]}

    def __len__(self):
        return 12

    def image(self, i):
        size = [(40, 80), (60, 60), (90, 40)][i % 3]
        picture, buffer = Image.new("RGB", size), io.BytesIO()
        picture.paste((200 + i, 0, 0), (0, 0, size[0] // 2, size[1]))
        picture.save(buffer, "png")
        buffer.seek(0)
        return buffer

    def texts(self, i):
        return [str(i)]

    def label(self, i):
        return 0

    def name(self, i):
        return str(i)


def test_images_keep_their_shape():
    lazy = Lazy("pictures", Pictures(), range(12), 32, 3, None, 0, True)
    assert sizes_of(lazy)[:3] == [(80, 40), (60, 60), (40, 90)]
    data = Bucketed(lazy, sizes_of(lazy), shapes(32, 8))
    loader = DataLoader(Batched(data), sampler=data.stream(4, 9), batch_size=None, num_workers=0)
    seen = set()
    for batch in loader:
        height, width = batch["image"].shape[2:]
        seen.add((height, width))
        assert batch["caption"] == [str(i) for i in batch["index"]]
        for image, i, flip in zip(batch["image"], batch["index"], batch["flip"], strict=True):
            left = image[0, :, : width // 2 - 1] if not flip else image[0, :, -(width // 2 - 1) :]
            assert torch.allclose(left, torch.tensor((200 + i) / 127.5 - 1), atol=0.2)
    assert seen == {(40, 24), (32, 32), (24, 40)}
    with pytest.raises(ValueError, match="2 buckets cannot be stacked"):
        data.batch([(0, 0), (0, 1)])
    with pytest.raises(ValueError, match="3 sizes do not fit"):
        Bucketed(lazy, [(1, 1)] * 3, [(8, 8)])
