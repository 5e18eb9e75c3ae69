from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from ldm.data import stream
from ldm.data.stream import BatchDataset, BatchStream
from ldm.data.synthetic import Synthetic
from ldm.tensors import derive_seed


def rows(stream):
    return [at for part in stream for at in part.samples]


def test_stream_epoch_is_a_permutation():
    seen = rows(BatchStream(length=10, batch=4, steps=5))
    assert [epoch for epoch, _ in seen] == [0] * 10 + [1] * 10
    first, second = [i for _, i in seen[:10]], [i for _, i in seen[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert rows(BatchStream(length=10, batch=4, steps=5)) == seen
    assert rows(BatchStream(length=10, batch=4, steps=5, seed=1)) != seen


def test_stream_order_is_uniform():
    first = Counter(BatchStream(length=4, batch=1, steps=1, seed=s).batch_at(0).samples[0][1] for s in range(2000))
    assert all(abs(n - 500) < 100 for n in first.values())


def test_stream_resumes_at_start():
    whole = list(BatchStream(7, 3, steps=9))
    assert list(BatchStream(7, 3, steps=9, start=4)) == whole[4:]
    assert len(BatchStream(7, 3, steps=9, start=4)) == 5
    assert [part.step for part in whole] == list(range(9))


@pytest.mark.parametrize(("batch", "world"), [(6, 1), (6, 2), (6, 3), (7, 3)])
def test_stream_ranks_partition_batch(batch, world):
    whole = list(BatchStream(10, batch, steps=4))
    ranks = [list(BatchStream(10, batch, steps=4, rank=r, world=world)) for r in range(world)]
    for step, part in enumerate(whole):
        assert [at for r in ranks for at in r[step].samples] == part.samples
        assert [p for r in ranks for p in r[step].position] == part.position == list(range(batch))
        assert {r[step].total for r in ranks} == {batch}


def test_stream_batch_larger_than_dataset():
    part = BatchStream(length=3, batch=8, steps=1).batch_at(0)
    assert [epoch for epoch, _ in part.samples] == [0, 0, 0, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "empty"),
        ({"batch": 1, "world": 2}, "batch=1"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"start": 9}, "start=9"),
    ],
)
def test_stream_rejects_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        BatchStream(**{"length": 10, "batch": 2, "steps": 8, **options})


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_matches_stream_for_any_workers(workers):
    data, stream = Synthetic(num=20), BatchStream(20, 8, steps=6, start=2)
    loader = DataLoader(BatchDataset(data), sampler=stream, batch_size=None, num_workers=workers)
    assert len(loader) == 4
    for batch, part in zip(loader, stream, strict=True):
        assert list(zip(batch["epoch"], batch["index"], strict=True)) == part.samples
        assert (batch["position"], batch["total"], batch["step"]) == (part.position, 8, part.step)
        assert torch.equal(batch["image"], data.batch(part.samples)["image"])
        assert batch["caption"] == data.batch(part.samples)["caption"]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_feistel_permutation_is_a_permutation(length):
    keys = [derive_seed(0, "order", turn) for turn in range(stream.ROUNDS)]
    assert sorted(stream.feistel_permutation(torch.arange(length), length, keys).tolist()) == list(range(length))
    some = torch.randperm(length)[:7]
    assert torch.equal(
        stream.feistel_permutation(some, length, keys),
        stream.feistel_permutation(torch.arange(length), length, keys)[some],
    )


@pytest.mark.parametrize(
    ("length", "order"),
    [
        (15, [3, 0, 14, 13, 5, 9, 7, 4, 8, 2, 12, 6, 1, 11, 10]),
        (16, [3, 0, 14, 13, 5, 15, 7, 4, 8, 2, 12, 6, 1, 11, 10, 9]),
        (17, [8, 4, 5, 7, 10, 12, 13, 16, 3, 2, 6, 11, 14, 0, 15, 9, 1]),
    ],
)
def test_feistel_permutation_stays_as_it_was(length, order):
    """So that a run resumes with the order that it began with."""
    keys = [1 << 60, 2 << 50, 3 << 40, 4, 5, 6]
    assert stream.feistel_permutation(torch.arange(length), length, keys).tolist() == order


def test_feistel_permutation_looks_random():
    """Neighbours come from anywhere, other keys give another order, and a value is no likelier in one half than in the
    other.
    """
    length = 1 << 16
    orders = [
        stream.feistel_permutation(
            torch.arange(length), length, [derive_seed(seed, turn) for turn in range(stream.ROUNDS)]
        ).double()
        for seed in (0, 1)
    ]
    places = torch.arange(length).double()
    for one, other in ((orders[0], orders[1]), (orders[0], places), (orders[0][1:], orders[0][:-1])):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 4 / length**0.5
    steps = (orders[0][1:] - orders[0][:-1]).abs()
    assert steps.mean() == pytest.approx(length / 3, rel=0.02)
    assert (orders[0] == places).sum() < 10


def test_stream_of_large_dataset_covers_epoch_on_any_ranks(monkeypatch):
    """Every sample once a pass, on any number of ranks, resumed anywhere."""
    monkeypatch.setattr(stream, "MAX_LISTED_SAMPLES", 10)
    whole = [part.samples for part in BatchStream(1000, 30, 100, seed=3)]
    flat = [pair for at in whole for pair in at]
    for epoch in range(3):
        assert sorted(i for e, i in flat if e == epoch) == list(range(1000))
    assert [i for e, i in flat if e == 0] != [i for e, i in flat if e == 1]
    shared = [BatchStream(1000, 30, 100, seed=3, rank=r, world=4).batch_at(33).samples for r in range(4)]
    assert [pair for at in shared for pair in at] == whole[33]
    assert next(iter(BatchStream(1000, 30, 100, seed=3, start=50))).samples == whole[50]


def test_stream_of_billion_samples_needs_no_memory():
    stream_of_all = BatchStream(10**9, 4096, 10**6, rank=7, world=1024)
    at = stream_of_all.batch_at(244_141).samples
    assert len(at) == 4
    assert all(0 <= i < 10**9 and e in (0, 1) for e, i in at)


class Endless:
    """A data set without a length."""

    def batch(self, samples):
        return {"index": [i for _, i in samples], "epoch": [epoch for epoch, _ in samples]}


class Wrapper:
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)


class Broken:
    def __len__(self):
        return "two" + 1


def test_endless_stream_numbers_samples_from_the_start():
    whole = list(BatchStream(None, batch=3, steps=4, seed=5))
    assert rows(whole) == [(0, i) for i in range(12)]
    assert [(part.position, part.total, part.step) for part in whole] == [([0, 1, 2], 3, step) for step in range(4)]
    resumed = BatchStream(None, batch=3, steps=4, start=2)
    assert list(resumed) == whole[2:]
    assert len(resumed) == 2


def test_endless_stream_ranks_partition_batch():
    whole = list(BatchStream(None, 7, 3))
    ranks = [list(BatchStream(None, 7, 3, rank=r, world=3)) for r in range(3)]
    for step, part in enumerate(whole):
        assert [at for r in ranks for at in r[step].samples] == part.samples
        assert [p for r in ranks for p in r[step].position] == part.position


def test_length_of_dataset_is_none_without_one():
    assert stream.length_of(Synthetic(num=5)) == 5
    assert stream.length_of(Endless()) is None
    assert stream.length_of(Wrapper(Endless())) is None
    with pytest.raises(TypeError, match="concatenate"):
        stream.length_of(Broken())


def test_stream_of_dataset_is_its_own_or_depends_on_length():
    class Streaming(Synthetic):
        stream = staticmethod(lambda *args: args)

    options = (4, 9, 1, 2, 0, 1)
    assert stream.make_stream(Synthetic(num=5))(*options) == BatchStream(5, *options)
    assert stream.make_stream(Wrapper(Endless()))(*options) == BatchStream(None, *options)
    assert stream.make_stream(Streaming(num=5))(*options) == options


def test_loader_reads_dataset_without_length():
    parts = BatchStream(None, 4, 5, start=1)
    loader = DataLoader(BatchDataset(Endless()), sampler=parts, batch_size=None, num_workers=1)
    batches = list(loader)
    assert [batch["index"] for batch in batches] == [list(range(4 * step, 4 * step + 4)) for step in range(1, 5)]
    assert len(loader) == 4
