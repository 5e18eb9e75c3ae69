"""What looks at a training finds what is there."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rows import Line, Rows, Seen, train
from torch import nn

from ldm.data.stream import BatchStream
from ldm.errors import NonFiniteError, UserError
from ldm.training import debug
from ldm.training.debug import NonFiniteDetector, OverfitOneBatch, Profile, all_finite
from ldm.training.profiler import ORDER, PhaseProfiler


class Deep(Line):
    """A line behind two layers, the second of which may divide by nothing; `harm` says where what is not finite comes
    from.
    """

    def __init__(self, harm):
        super().__init__()
        self.before, self.inner, self.harm = nn.Sequential(nn.Linear(1, 1), nn.Identity()), Root(), harm

    def training_step(self, batch, batch_idx):
        at = batch["step"] == 2
        self.inner.by = 0.0 if at and self.harm == "module" else 1.0
        if at and self.harm == "weight":
            self.line.weight.data.fill_(float("inf"))
        answer = self.line(self.inner(self.before(batch["x"])))
        loss = (answer - 1).square().mean()
        if at and self.harm == "loss":
            loss = loss / 0
        if at and self.harm == "gradient":
            loss = loss + (self.line.bias - self.line.bias.detach()).abs().sqrt().sum()
        return {"loss": loss}


class Root(nn.Module):
    by = 1.0

    def forward(self, x):
        return x / self.by


SAID = {
    "module": r"step 3: inner \(Root\) gives numbers that are not finite; its input was finite$",
    "weight": r"step 3: line \(Linear\) gives .*; its input was finite, and its weight$",
    "loss": "step 3: every module's answer is finite, the loss made of them is not",
    "gradient": "step 3: the loss is finite, its gradient by line.bias is not",
}


@pytest.mark.parametrize("harm", SAID)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_detector_names_first_module(harm, accumulate, tmp_path):
    with pytest.raises(NonFiniteError, match=SAID[harm]):
        train(Deep(harm), Rows(), [NonFiniteDetector(tmp_path)], steps=5, accumulate_grad_batches=accumulate)


def test_non_finite_detector_leaves_no_hooks(tmp_path):
    lit = Deep(None)
    train(lit, Rows(), [NonFiniteDetector(tmp_path)], steps=3)
    assert not any(module._forward_hooks for module in lit.modules())


@pytest.mark.parametrize(
    ("step", "said"), [(2, None), (3, r"step 3: inner"), (4, r"step 4: before.0 .* and its weight, bias$")]
)
def test_debug_step_inspects_one_step_and_stops(step, said, tmp_path, capfd):
    """The third is harmed, and the weights after it."""
    seen = Seen()
    with pytest.raises(NonFiniteError if said else SystemExit, match=said or "^0$"):
        train(Deep("module"), Rows(), [NonFiniteDetector(tmp_path, step), seen], steps=6)
    assert ("every module's answer, the loss and its gradient are finite" in capfd.readouterr().out) == (said is None)
    assert len(seen.terms) == step - 1


def test_debug_step_before_start_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"debug.step=2: this begins with step 4; choose an earlier checkpoint by resume="
    ):
        train(Line(), Rows(), [NonFiniteDetector(tmp_path, 2)], steps=6, start=3)


def test_overfit_one_batch_repeats_batch(tmp_path):
    keys, losses = [], Seen()

    class Keys(Seen):
        def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
            keys.append((batch["step"], list(zip(batch["epoch"], batch["index"], strict=True))))

    train(Line(), Rows(), [OverfitOneBatch(tmp_path), losses, Keys()], steps=40)
    first = BatchStream(16, 4, 1).batch_at(0).samples
    assert keys == [(step, first) for step in range(40)]
    assert losses.terms[-1]["loss"] < 0.1 * losses.terms[0]["loss"]


@pytest.mark.parametrize("steps", [4, 12])
def test_profile_writes_table_and_trace(steps, tmp_path, capfd):
    train(Line(), Rows(), [Profile(tmp_path, 2, 2, 5)], steps=steps)
    text = (tmp_path / "profile" / "table.txt").read_text()
    assert "aten::addmm" in text
    assert (tmp_path / "profile" / "trace.json").read_text().lstrip().startswith("{")
    rows = {line[:12].strip(): (float(line[12:24]), float(line[27:37])) for line in text.split("\n\n")[0].splitlines()}
    assert list(rows) == [*ORDER, "a step"]
    *kinds, (whole, share) = rows.values()
    assert sum(ms for ms, _ in kinds) == pytest.approx(whole, abs=0.01)
    assert sum(part for _, part in kinds) == pytest.approx(share, abs=0.1)
    assert share == 100
    assert min(rows[kind][0] for kind in ("forward", "backward", "optimiser")) > 0
    assert (rows["data"][0] > 0) == (steps > 4), "the last batch comes before the last step"
    assert capfd.readouterr().out.count("backward") == 1


def test_profile_of_short_training_reports_too_few_steps(tmp_path):
    train(Line(), Rows(), [Profile(tmp_path, 2, 3, 5)], steps=3)
    assert (tmp_path / "profile" / "table.txt").read_text().startswith("too few steps to time")


class Trace:
    """A torch profiler that records what is done with it."""

    def __init__(self, events):
        self.events = events

    def start(self):
        self.events.append("start")

    def stop(self):
        self.events.append("stop")

    def export_chrome_trace(self, path):
        self.events.append(Path(path).name)

    def key_averages(self):
        return SimpleNamespace(table=lambda sort_by, row_limit: f"by {sort_by}")


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("last", [1, 2, 4, 5, 8, 9])
def test_profile_traces_its_steps_then_times_the_next(cuda, last, tmp_path, monkeypatch):
    """Traced are steps 2 and 3, timed are steps 4 to 8; `last` is the last step of the training."""
    ticks, events = iter(range(100)), []
    monkeypatch.setattr(debug, "synchronized_time", lambda device: next(ticks))
    monkeypatch.setattr(torch.profiler, "profile", lambda record_shapes: Trace(events))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    profile = Profile(tmp_path, first_step=2, traced=2, steps=5)
    trainer, lit = (
        SimpleNamespace(is_global_zero=True, profiler=PhaseProfiler()),
        SimpleNamespace(device=torch.device("cpu")),
    )
    begun = {}
    for step in range(1, last + 1):
        profile.on_train_batch_start(trainer, lit, {}, step)
        begun[step] = len(events)
    done = (tmp_path / "profile" / "table.txt").exists()
    assert done == (last >= 9)
    profile.on_train_end(trainer, lit)
    assert [begun[step] for step in range(1, last + 1)] == [0, 1, 1, *[3] * 6][:last]
    if last == 1:
        assert not (tmp_path / "profile").exists()
        return
    assert events == ["start", "stop", "trace.json"]
    text = (tmp_path / "profile" / "table.txt").read_text()
    assert text.endswith(f"\n\nby self_{'cuda' if cuda else 'cpu'}_time_total")
    timed = min(last, 8) - 3  # one tick passes between the two looks at the clock
    if timed <= 0:
        assert text.startswith("too few steps to time")
    else:
        assert f"a step{1e3 / timed:>18.3f} ms{100:>10.2f} %" in text


def test_profile_is_of_the_first_process(tmp_path):
    profile = Profile(tmp_path, first_step=1, traced=1, steps=1)
    for step in range(4):
        profile.on_train_batch_start(SimpleNamespace(is_global_zero=False), None, {}, step)
    profile.on_train_end(SimpleNamespace(is_global_zero=False), None)
    assert profile.trace is None
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("value", "finite"),
    [
        ({"a": [torch.zeros(2), "text", None], "b": torch.tensor([1, 2])}, True),
        ((torch.zeros(2), {"b": torch.tensor([0.0, math.inf])}), False),
        (torch.tensor(math.nan), False),
        ([], True),
    ],
)
def test_all_finite_looks_at_floating_point_tensors_of_nested_data(value, finite):
    assert all_finite(value) == finite
