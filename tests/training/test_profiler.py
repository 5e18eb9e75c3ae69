"""Every second of a step is in one kind, and every product is counted."""

import time
from contextlib import nullcontext
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rows import Line, Rows, train
from torch import nn

from ldm.ema import PowerEMA
from ldm.training import callbacks, profiler
from ldm.training.callbacks import EMACallback, MetricsRecorder, SampleGridCallback
from ldm.training.profiler import ORDER, FlopCounter, PhaseProfiler, StepTimer, peak_flops, phase, phase_of, table
from ldm.training.user_callbacks import UserCallbacks

NAP = 0.02


class Slow(Line):
    """A line that naps where it is told to."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def nap(self, where):
        if self.where == where:
            time.sleep(NAP)

    def training_step(self, batch, batch_idx):
        with phase(self, "encode"):
            self.nap("encode")
        self.nap("forward")
        out = super().training_step(batch, batch_idx)
        out["loss"].register_hook(lambda grad: self.nap("backward"))
        return out

    def on_before_optimizer_step(self, optimizer):
        self.nap("optimiser")


class Own(L.Callback):
    phase = "EMA"

    def __init__(self, lit):
        self.lit = lit

    def on_train_batch_end(self, *args):
        self.lit.nap("own")


class Napping(Rows):
    def __init__(self, lit):
        self.lit = lit

    def batch(self, at):
        self.lit.nap("data")
        return super().batch(at)


@pytest.mark.parametrize(
    ("where", "accumulate"),
    [
        *(
            (where, 1)
            for where in ("data", "encode", "forward", "backward", "optimiser", "EMA", "logging", "saving", "own")
        ),
        ("data", 2),
        ("EMA", 2),
        ("own", 2),
    ],
)
def test_profiler_attributes_sleep_to_its_phase(where, accumulate, monkeypatch):
    peak_flops("32-true", torch.device("cpu"))  # measured once in a process
    lit, spent = Slow(where), []
    made = PhaseProfiler.__init__
    monkeypatch.setattr(
        PhaseProfiler, "__init__", lambda self, *args, **more: (made(self, *args, **more), spent.append(self))[0]
    )
    ema = PowerEMA(lit, 0.1)
    update = ema.update
    monkeypatch.setattr(ema, "update", lambda: (lit.nap("EMA"), update())[1])
    record = MetricsRecorder(lambda step, values: lit.nap("logging"), 1, 4)
    pictures = SampleGridCallback(lambda step: lit.nap("saving"), 1)
    own = Own(lit)  # of any name: what counts is its phase
    train(lit, Napping(lit), [EMACallback(ema), record, pictures, own], steps=4, accumulate_grad_batches=accumulate)
    seconds = spent[0].seconds
    where = Own.phase if where == "own" else where
    naps = 4 * NAP * (accumulate if where in ("data", "encode", "forward", "backward") else 1)
    assert naps <= seconds[where]
    assert max(seconds, key=lambda kind: seconds[kind] if kind != "other" else 0) == where


def test_profiler_assigns_each_second_to_one_phase():
    """By a clock that ticks once each time that it is looked at."""
    ticks = iter(range(100))
    spent = PhaseProfiler(clock=lambda: next(ticks))
    spent.start("[Strategy]One.training_step")
    spent.start("encode")
    spent.stop("encode")
    spent.stop("[Strategy]One.training_step")
    spent.start("[Callback]Mine.on_train_batch_end")
    spent.stop("[Callback]Mine.on_train_batch_end")
    found = spent.elapsed()
    assert {kind: n for kind, n in found.items() if n} == {"forward": 2, "encode": 1, "callbacks": 1, "other": 3}
    assert list(found) == list(ORDER)
    said = table(found, 2).splitlines()
    assert said[1].split() == ["encode", "500.000", "ms", "14.29", "%"]
    assert said[-1].split() == ["a", "step", "3500.000", "ms", "100.00", "%"]


def test_profiler_counts_time_between_hooks_as_backward():
    """However it was asked for: of a step with two optimisers too."""
    ticks = iter(range(100))
    spent = PhaseProfiler(clock=lambda: next(ticks))
    spent.start("[Strategy]One.training_step")
    for _ in range(2):
        for hook in ("on_before_backward", "on_after_backward"):
            for owner in ("[Callback]Gradients", "[LightningModule]Lit"):
                spent.start(f"{owner}.{hook}")
                spent.stop(f"{owner}.{hook}")
    spent.stop("[Strategy]One.training_step")
    found = {kind: n for kind, n in spent.seconds.items() if n}
    assert found == {"forward": 5, "backward": 4, "callbacks": 4, "other": 5}, (
        "the hooks are 8 of the callbacks and others, and forward goes on behind them"
    )


def test_recorder_data_wait_is_since_last_record(monkeypatch):
    ticks, rows, spent = iter(range(0, 1000, 10)), [], PhaseProfiler()
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    record = MetricsRecorder(lambda step, values: rows.append(values), 1, 3)
    trainer = SimpleNamespace(
        is_global_zero=True, profiler=spent, optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]
    )
    for step, wait in enumerate((2.0, 5.0, 1.0)):
        spent.seconds["data"] += wait
        record.on_train_batch_end(trainer, None, {"loss": torch.ones(())}, {"step": step, "total": 4}, step)
    assert [row["perf/data_wait"] for row in rows] == [0.2, 0.5, 0.1]
    assert [row["perf/images_per_s"] for row in rows] == [0.4] * 3


def test_count_flops_of_forward_and_backward():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5))
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with FlopCounter() as counter:
        net(x).sum().backward()
    forward = 2 * 2 * (8 * 16 * 3 * 9 + 8 * 16 * 5)
    assert counter.flops == 3 * forward


@pytest.mark.parametrize("accumulate", [1, 2])
def test_recorder_always_writes_pace(accumulate):
    rows = []
    train(
        Line(),
        Rows(),
        [MetricsRecorder(lambda step, values: rows.append(values), 2, 6)],
        steps=6,
        accumulate_grad_batches=accumulate,
    )
    for row in rows:
        assert {"perf/images_per_s", "perf/data_wait", "perf/mfu"} <= row.keys()
        assert 0 < row["perf/data_wait"] < 1
        flops = 4 * 2 * 2  # a weight, four rows, forward and its gradient; the data want none
        assert row["perf/mfu"] * peak_flops("32-true", torch.device("cpu")) == pytest.approx(
            flops * row["perf/images_per_s"] / 4
        )


@pytest.mark.parametrize("low", [False, True])
def test_count_flops_does_not_change_results(low):
    """Our networks' operators run as they are with a counter around them; torch's own counter decomposes SiLU."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    norm, linear = nn.GroupNorm(2, 8), nn.Linear(8, 24)
    x, ends = torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last), []
    for counted in (False, True):
        with FlopCounter() if counted else nullcontext() as counter, torch.autocast("cpu", torch.bfloat16, enabled=low):
            q, k, v = (
                linear(nn.functional.silu(norm(conv(x))).flatten(2).mT)
                .unflatten(-1, (2, 12))
                .transpose(1, 2)
                .chunk(3, -1)
            )
            loss = nn.functional.scaled_dot_product_attention(q, k, v).float().square().mean()
            loss.backward()
        ends.append([loss.detach(), *(p.grad for p in (*conv.parameters(), *norm.parameters(), *linear.parameters()))])
        for p in (*conv.parameters(), *norm.parameters(), *linear.parameters()):
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    products = 2 * 2 * 64 * 8 * (8 * 9 + 24)
    attention = 2 * 2 * 2 * 2 * 64 * 64 * 4
    flops = 3 * products - 2 * 2 * 64 * 8 * 8 * 9 + 3.5 * attention
    assert counter.flops == flops, "x wants no gradient; attention is done again backward"


class Clock:
    """A clock that shows the given seconds, one a look."""

    def __init__(self, *seconds):
        self.seconds = iter(seconds)

    def __call__(self, device=None):
        return next(self.seconds)


def test_peak_flops_is_of_the_fastest_of_three_products(monkeypatch):
    monkeypatch.setattr(profiler, "synchronized_time", Clock(0.0, 8.0, 10.0, 14.0, 20.0, 25.0))
    monkeypatch.setattr(profiler, "SIDE", {"cpu": 4})
    assert profiler._peak.__wrapped__(torch.float32, torch.device("cpu"), 1) == 2 * 4**3 / 4.0


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("bf16-mixed", torch.bfloat16),
        ("16-true", torch.float16),
        ("64-true", torch.float64),
        ("32-true", torch.float32),
    ],
)
def test_peak_flops_is_measured_in_the_precision_of_the_training(precision, dtype, monkeypatch):
    monkeypatch.setattr(profiler, "_peak", lambda *key: key)
    assert peak_flops(precision, torch.device("cpu"))[:2] == (dtype, torch.device("cpu"))


def test_step_timer_times_each_step(monkeypatch):
    monkeypatch.setattr(profiler, "synchronized_time", Clock(1.0, 3.0, 10.0, 15.0))
    timer, lit = StepTimer(), SimpleNamespace(device=torch.device("cpu"))
    for _ in range(2):
        timer.on_train_batch_start(None, lit, None, 0)
        timer.on_train_batch_end(None, lit, None, None, 0)
    assert timer.seconds == [2.0, 5.0]


@pytest.mark.parametrize("parts", [1, 2])
def test_profiler_counts_flops_of_second_step_only(parts):
    spent, a = PhaseProfiler(parts), torch.ones(3, 3)
    for size in (1, 2, 4):  # products in each batch of a step
        for _ in range(parts):
            assert spent.flops == (None if size < 4 else 2 * parts * 2 * 27)
            spent.start("run_training_batch")
            for _ in range(size):
                a @ a
            spent.stop("run_training_batch")
        a @ a  # between steps
    assert spent.flops == 2 * parts * 2 * 27


def test_phase_counts_within_a_training_and_has_no_effect_without(monkeypatch):
    ticks = iter(range(10))
    spent = PhaseProfiler(clock=lambda: next(ticks))
    monkeypatch.setattr(profiler, "trainer_of", lambda lit: SimpleNamespace(profiler=spent) if lit else None)
    with phase("module", "encode"):
        pass
    assert spent.seconds["encode"] == 1
    with phase(None, "encode"):
        pass
    assert spent.seconds["encode"] == 1


def test_flops_are_counted_with_an_operators_keyword_arguments(monkeypatch):
    counts = {torch.ops.aten.add: lambda a, b, *, alpha=1, out_val: alpha * out_val.numel()}
    monkeypatch.setattr(profiler, "FLOP_COUNTS", counts)
    with FlopCounter() as counter:
        out = torch.add(torch.ones(5), torch.ones(5), alpha=3)
    assert (counter.flops, out.tolist()) == (15, [4.0] * 5)


class Recorded(PhaseProfiler):
    """Keeps the functions of all actions, and the last of these profilers."""

    last: "Recorded"

    def __init__(self, *args, **options):
        ticks = iter(range(10**6))
        super().__init__(*args, clock=lambda: next(ticks), **options)
        self.functions, Recorded.last = set(), self

    def start(self, action_name):
        self.functions.add(action_name.rpartition(".")[2])
        super().start(action_name)


class Idle(L.Callback):
    def on_train_batch_end(self, *args):
        pass


@pytest.mark.parametrize("parts", [1, 2])
def test_every_phase_of_a_training_is_recognised(parts, monkeypatch, tmp_path):
    """Lightning's actions are text: one that a release renames would count as other, and this test would fail."""
    monkeypatch.setattr("ldm.training.fit.PhaseProfiler", Recorded)
    lit = Slow("nowhere")
    ema, user = PowerEMA(lit, 0.1), UserCallbacks({"idle": Idle()}, print, tmp_path)
    grids = SampleGridCallback(lambda step: None, 1)
    recorder = MetricsRecorder(lambda step, values: None, 1, 2)
    train(lit, Rows(), [EMACallback(ema), recorder, user, grids], steps=2, accumulate_grad_batches=parts)
    spent = Recorded.last
    assert spent.functions >= {*profiler.HOOKS, profiler.TRAINING_BATCH}
    assert spent.functions >= {profiler.BEFORE_BACKWARD, profiler.AFTER_BACKWARD}
    assert [kind for kind in ORDER if not spent.seconds[kind]] == [], "each action takes a tick of the clock"


def test_phase_with_a_wrong_name_is_an_error():
    one = L.Callback()
    assert phase_of(one) is None
    one.phase = "optimizer"
    with pytest.raises(ValueError, match=r"Callback.phase='optimizer': expected one of data, encode"):
        phase_of(one)
