"""A step made of several batches is the step of one."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rows import Line, Rows, Seen, train

from ldm.data.stream import BatchStream
from ldm.training.accumulate import MicroBatchStream, StepCallbacks
from ldm.training.profiler import PhaseProfiler


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


class Recorder(L.Callback):
    """Records each hook that is called, with the batch index or the terms."""

    phase = "logging"

    def __init__(self):
        self.calls = []

    def on_fit_start(self, trainer, lit):
        self.calls.append("fit start")

    def on_train_start(self, trainer, lit):
        self.calls.append("train start")

    def on_train_end(self, trainer, lit):
        self.calls.append("train end")

    def on_train_batch_start(self, trainer, lit, batch, batch_idx):
        self.calls.append(("start", batch_idx))

    def on_before_backward(self, trainer, lit, loss):
        self.calls.append("before backward")

    def on_after_backward(self, trainer, lit):
        self.calls.append("after backward")

    def on_before_optimizer_step(self, trainer, lit, optimizer):
        self.calls.append("optimizer")

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        terms = {name: float(value) for name, value in outputs.items()}
        self.calls.append(("end", batch_idx, terms, batch["epoch"], batch["index"], batch["step"]))


@pytest.mark.parametrize("automatic", [True, False])
def test_callbacks_are_called_once_a_step_with_means_and_all_keys(automatic):
    recorder = Recorder()
    callback = StepCallbacks([recorder], 2)
    trainer = SimpleNamespace(profiler=PhaseProfiler())
    lit = SimpleNamespace(automatic_optimization=automatic)
    callback.on_fit_start(trainer, lit)
    callback.on_train_start(trainer, lit)
    for k in range(4):
        batch = {"epoch": [k, k], "index": [10 * k, 10 * k + 1], "step": k // 2}
        callback.on_train_batch_start(trainer, lit, batch, k)
        callback.on_before_backward(trainer, lit, torch.zeros(()))
        callback.on_after_backward(trainer, lit)
        if k % 2:
            callback.on_before_optimizer_step(trainer, lit, None)
        terms = {"loss": torch.tensor(float(k)), "rec": torch.tensor(2.0 * k)}
        callback.on_train_batch_end(trainer, lit, terms, batch, k)
    callback.on_train_end(trainer, lit)

    def step(number):
        first, loss = 2 * number, 2 * number + 0.5
        keys = [first] * 2 + [first + 1] * 2, [10 * first, 10 * first + 1, 10 * first + 10, 10 * first + 11]
        # Lightning divides the loss of an automatic optimization, and no other term
        means = {"loss": loss * (2 if automatic else 1), "rec": 2 * loss}
        backward = ["before backward", "after backward"]
        return [("start", first), *backward, *backward, "optimizer", ("end", first + 1, means, *keys, number)]

    assert recorder.calls == ["fit start", "train start", *step(0), *step(1), "train end"]
