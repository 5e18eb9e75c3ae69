from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data.stream import Batched, Stream
from ldm.data.synthetic import Synthetic


def rows(stream):
    return [at for part in stream for at in part.at]


def test_every_pass_has_every_sample_once_and_an_order_of_its_own():
    seen = rows(Stream(length=10, batch=4, steps=5))
    assert [place for place, _ in seen] == [0] * 10 + [1] * 10
    first, second = [i for _, i in seen[:10]], [i for _, i in seen[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert rows(Stream(length=10, batch=4, steps=5)) == seen
    assert rows(Stream(length=10, batch=4, steps=5, seed=1)) != seen


def test_the_order_is_uniform():
    first = Counter(Stream(length=4, batch=1, steps=1, seed=s).at(0).at[0][1] for s in range(2000))
    assert all(abs(n - 500) < 100 for n in first.values())


def test_a_later_start_goes_on_where_the_stream_was():
    whole = list(Stream(7, 3, steps=9))
    assert list(Stream(7, 3, steps=9, start=4)) == whole[4:]
    assert len(Stream(7, 3, steps=9, start=4)) == 5
    assert [part.step for part in whole] == list(range(9))


@pytest.mark.parametrize(("batch", "world"), [(6, 1), (6, 2), (6, 3), (7, 3)])
def test_the_ranks_slices_make_up_the_batch(batch, world):
    whole = list(Stream(10, batch, steps=4))
    ranks = [list(Stream(10, batch, steps=4, rank=r, world=world)) for r in range(world)]
    for step, part in enumerate(whole):
        assert [at for r in ranks for at in r[step].at] == part.at
        assert [p for r in ranks for p in r[step].position] == part.position == list(range(batch))
        assert {r[step].total for r in ranks} == {batch}


def test_a_data_set_smaller_than_the_batch():
    part = Stream(length=3, batch=8, steps=1).at(0)
    assert [place for place, _ in part.at] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"length": 0}, "empty"), ({"batch": 1, "world": 2}, "batch=1"), ({"rank": 2, "world": 2}, "rank 2 of 2"), ({"start": 9}, "start=9")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Stream(**{"length": 10, "batch": 2, "steps": 8, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_streams_batches_whatever_its_workers(workers):
    data, stream = Synthetic(num=20), Stream(20, 8, steps=6, start=2)
    loader = DataLoader(Batched(data), sampler=stream, batch_size=None, num_workers=workers)
    assert len(loader) == 4
    for batch, part in zip(loader, stream, strict=True):
        assert list(zip(batch["place"], batch["index"], strict=True)) == part.at
        assert (batch["position"], batch["total"], batch["step"]) == (part.position, 8, part.step)
        assert torch.equal(batch["image"], data.batch(part.at)["image"])
        assert batch["caption"] == data.batch(part.at)["caption"]
