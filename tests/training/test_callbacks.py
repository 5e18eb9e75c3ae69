"""What each callback does at a step, with a trainer of a few attributes."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.ema import PowerEMA
from ldm.errors import NonFiniteError
from ldm.training import callbacks
from ldm.training.callbacks import (
    EMACallback,
    EvaluationCallback,
    LearningRate,
    MetricsRecorder,
    Progress,
    SampleGridCallback,
)
from ldm.training.profiler import PhaseProfiler


def trainer(chief=True, **more):
    return SimpleNamespace(is_global_zero=chief, profiler=PhaseProfiler(), optimizers=[optimizer(1.0)], **more)


def optimizer(*rates):
    return SimpleNamespace(param_groups=[{"lr": rate} for rate in rates])


def end_step(callback, step, outputs=None, lit=None, chief=True, total=4):
    callback.on_train_batch_end(trainer(chief), lit, outputs, {"step": step, "total": total}, step)


def test_learning_rate_is_configured_rate_times_factor():
    optimizers = [optimizer(0.5, 0.25), optimizer(2.0)]
    callback = LearningRate(lambda step, total: (step + 1) / total, 8)
    for step in (0, 5, 1):
        callback.on_train_batch_start(SimpleNamespace(optimizers=optimizers), None, {"step": step}, 0)
        rates = [group["lr"] for one in optimizers for group in one.param_groups]
        assert rates == [rate * (step + 1) / 8 for rate in (0.5, 0.25, 2.0)]


def test_average_is_updated_after_steps_that_were_not_skipped():
    updates, skipped = [], iter([False, True, False])
    average = SimpleNamespace(update=lambda: updates.append(True), module=object())
    guard = SimpleNamespace(has_skipped=lambda module: module is average.module and next(skipped))
    for step in range(3):
        end_step(EMACallback(average, guard), step)
    assert len(updates) == 2
    end_step(EMACallback(average), 3)
    assert len(updates) == 3


class Averaged:
    """A module, its average, and what a look at it finds."""

    def __init__(self):
        self.lit = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.lit.weight, 2.0)
        self.ema = PowerEMA(self.lit)
        self.ema.shadow["weight"].fill_(3.0)
        self.looks = []

    def look(self, step=None):
        self.looks.append((step, float(self.lit.weight.detach()), self.lit.training))
        return {"val/x": 1.0}

    @property
    def is_restored(self):
        return float(self.lit.weight.detach()) == 2.0 and self.lit.training


@pytest.mark.parametrize("chief", [True, False])
def test_evaluation_measures_the_average_in_evaluation_mode_every_so_often(chief):
    one, written = Averaged(), []
    callback = EvaluationCallback(one.look, lambda step, values: written.append((step, values)), 3, one.ema)
    for step in range(6):
        end_step(callback, step, lit=one.lit, chief=chief)
        assert one.is_restored
    assert one.looks == [(None, 3.0, False)] * 2  # all processes measure together
    assert written == ([(3, {"val/x": 1.0}), (6, {"val/x": 1.0})] if chief else [])


@pytest.mark.parametrize("averaged", [True, False])
def test_sample_grid_is_of_the_average_in_evaluation_mode_every_so_often(averaged):
    one = Averaged()
    callback = SampleGridCallback(one.look, 2, one.ema if averaged else None)
    for step in range(4):
        end_step(callback, step, lit=one.lit)
        assert one.is_restored
    weight = 3.0 if averaged else 2.0
    assert one.looks == [(2, weight, False), (4, weight, False)]


def test_sample_grid_is_drawn_by_first_process_only():
    one = Averaged()
    end_step(SampleGridCallback(one.look, 1, one.ema), 0, lit=one.lit, chief=False)
    assert one.looks == []
    assert one.is_restored


@pytest.fixture
def ticks(monkeypatch):
    """A clock that is at 10 times the number of times it was looked at."""
    numbers = iter(range(0, 1000, 10))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(numbers)))


@pytest.mark.usefixtures("ticks")
def test_recorder_writes_means_since_last_record_and_at_the_end():
    rows = []
    recorder = MetricsRecorder(lambda step, values: rows.append((step, values)), 3, 7)
    losses = [1.0, 2.0, 6.0, 4.0, 4.0, 7.0, 9.0]
    for step, loss in enumerate(losses):
        terms = {"loss": torch.tensor(loss)} | ({"rare": torch.tensor(8.0 + step)} if step in (1, 2) else {})
        end_step(recorder, step, terms)
    assert [step for step, _ in rows] == [3, 6, 7]
    assert [row["train/loss"] for _, row in rows] == [3.0, 5.0, 9.0]
    assert rows[0][1]["train/rare"] == 9.5  # the mean of the steps that had it
    assert "train/rare" not in rows[1][1]
    assert [row["perf/images_per_s"] for _, row in rows] == [1.2, 1.2, 0.4]
    assert all(row["train/lr"] == 1.0 for _, row in rows)
    assert all("perf/mfu" not in row and "train/skipped" not in row for _, row in rows)


@pytest.mark.usefixtures("ticks")
def test_recorder_writes_share_of_peak_flops():
    rows = []
    recorder = MetricsRecorder(lambda step, values: rows.append(values), 2, 2)
    recorder.peak = 50.0
    for step in range(2):
        one = trainer()
        one.profiler = SimpleNamespace(flops=100, seconds={"data": 0.0})
        recorder.on_train_batch_end(one, None, {"loss": torch.zeros(())}, {"step": step, "total": 1}, step)
    assert rows[0]["perf/mfu"] == 100 * 2 / 10 / 50


@pytest.mark.usefixtures("ticks")
def test_recorder_counts_skipped_steps_and_leaves_out_their_terms():
    rows, guard = [], SimpleNamespace(skipped=False, norms={"grad_norm": torch.tensor(2.0)})
    recorder = MetricsRecorder(lambda step, values: rows.append(values), 3, 6, guard)
    for step in range(6):
        guard.skipped = step in (0, 2)
        end_step(recorder, step, {"loss": torch.tensor(math.nan if guard.skipped else 4.0)})
    assert [row.get("train/skipped") for row in rows] == [2, None]
    assert [row["train/loss"] for row in rows] == [4.0, 4.0]
    assert [row["train/grad_norm"] for row in rows] == [2.0, 2.0]


@pytest.mark.usefixtures("ticks")
@pytest.mark.parametrize("chief", [True, False])
def test_recorder_ends_training_at_infinite_loss_on_all_ranks(chief):
    rows = []
    recorder = MetricsRecorder(lambda step, values: rows.append(values), 1, 3)
    end_step(recorder, 0, {"loss": torch.tensor(1.0)}, chief=chief)
    assert len(rows) == int(chief)
    with pytest.raises(NonFiniteError, match="not finite at step 2"):
        end_step(recorder, 1, {"loss": torch.tensor(math.inf)}, chief=chief)


def test_recorder_starts_its_clock_with_the_training(monkeypatch):
    monkeypatch.setattr(callbacks, "peak_flops", lambda precision, device: (precision, device))
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: 5.0))
    recorder = MetricsRecorder(print, 1, 1)
    one = trainer(precision="bf16-mixed")
    one.profiler.seconds["data"] = 2.0
    recorder.on_train_start(one, SimpleNamespace(device="cpu"))
    assert (recorder.peak, recorder.since, recorder.waited) == (("bf16-mixed", "cpu"), 5.0, 2.0)


def test_progress_shows_steps_done_in_first_process():
    shown = []
    callback = Progress("x", 0, 9)
    callback.bar = SimpleNamespace(update=lambda step, text: shown.append((step, text)))
    end_step(callback, 3, {"loss": torch.tensor(0.125)})
    end_step(callback, 4, {"loss": torch.tensor(0.125)}, chief=False)
    assert shown == [(4, "loss 0.125  ")]
