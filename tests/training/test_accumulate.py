"""A step made of several batches is the step of one."""

import pytest
from rows import Line, Rows, Seen, train

from ldm.data.stream import BatchStream
from ldm.training.accumulate import MicroBatchStream


def test_micro_batches_partition_batches():
    whole, parts = BatchStream(10, 6, 3, seed=1), MicroBatchStream(BatchStream(10, 6, 3, seed=1), 3)
    assert len(parts) == 9
    for step, one in enumerate(whole):
        cut = list(parts)[3 * step : 3 * step + 3]
        assert [key for part in cut for key in part.samples] == one.samples
        assert [place for part in cut for place in part.position] == one.position
        assert {(part.step, part.total, len(part.samples)) for part in cut} == {(step, 6, 2)}


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_matches_full_batch(parts):
    seen = [Seen(), Seen()]
    for one, accumulate in zip(seen, (1, parts), strict=True):
        train(Line(), Rows(), [one], steps=5, accumulate_grad_batches=accumulate)
    assert len(seen[1].terms) == 5
    assert seen[1].weights == pytest.approx(seen[0].weights, rel=1e-5)
    for whole, cut in zip(seen[0].terms, seen[1].terms, strict=True):
        assert cut == pytest.approx(whole, rel=1e-5)


def test_accumulation_rejects_indivisible_batch():
    with pytest.raises(
        ValueError, match=r"batch_size=4 cannot be split into 3 equal parts \(1 processes, accumulate_grad_batches=3\)"
    ):
        train(Line(), Rows(), [], steps=1, accumulate_grad_batches=3)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"num_workers": -1}, "num_workers=-1: expected 0"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0: expected 1"),
        ({"strategy": "0x10"}, "expected auto"),
    ],
)
def test_trainer_rejects_invalid_numbers_and_names(typed, said):
    with pytest.raises(ValueError, match=said):
        train(Line(), Rows(), [], steps=1, **typed)
