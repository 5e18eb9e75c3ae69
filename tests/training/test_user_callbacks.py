"""Callbacks of a config: every hook of Lightning, their order, their state, what they log, and what is refused."""

import sys
from collections import Counter
from inspect import isfunction
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from rows import Line, Rows, train

from ldm.checkpoint.step import list_checkpoints, load_checkpoint
from ldm.ema import PowerEMA
from ldm.errors import UserError
from ldm.recipes.callbacks import build_callbacks, check_callbacks
from ldm.recipes.run import TrainingRun
from ldm.runs.metrics_log import MetricsLog, read_metrics_log
from ldm.training.callbacks import EMACallback, find_average
from ldm.training.checkpoints import CheckpointCallback, CheckpointRestorer
from ldm.training.loggers import NoLogger
from ldm.training.user_callbacks import RunLogger, UserCallbacks, arrange, require_loadable

HOOKS = {name for name, value in vars(L.Callback).items() if isfunction(value) and not name.startswith("_")}
NEVER = {  # a training has no loop of Lightning but that of fit: it validates, scores and samples by callbacks of ldm
    name for name in HOOKS if any(f"on_{loop}_" in name for loop in ("sanity_check", "validation", "test", "predict"))
}
PACKAGE = """
import lightning as L

class Count(L.Callback):
    def __init__(self, start: int = 0):
        self.calls = []

def counting(name):
    def hook(self, *args, **kwargs):
        self.calls.append(name)
        return {"a": len(self.calls)} if name == "state_dict" else None
    return hook

for name, value in list(vars(L.Callback).items()):
    if callable(value) and not name.startswith("_"):
        setattr(Count, name, counting(name))

def no_callback():
    return 3

class Unpicklable(L.Callback):
    def state_dict(self):
        return {"a": self}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A user's package `counted`, importable."""
    (tmp_path / "counted").mkdir()
    (tmp_path / "counted" / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "counted"
    sys.modules.pop("counted", None)


class Manual(Line):
    """A line with two optimizers, which it steps itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.parts = 1

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.01)]

    def training_step(self, batch, batch_idx):
        terms = super().training_step(batch, batch_idx)
        self.manual_backward(terms["loss"] / self.parts)
        if (batch_idx + 1) % self.parts == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return terms


def run(folder, callbacks, steps, resume=None, every=2, lit=None, ema=False, **options):
    """Train a line with callbacks; return the rows that were written, and the module."""
    rows, lit = [], lit or Line()
    average = PowerEMA(lit.line, 0.1) if ema else None
    user = UserCallbacks(callbacks, lambda step, values: rows.append((step, dict(values))), folder)
    saving = CheckpointCallback(folder / "checkpoints", average, every, steps, "", user=user)
    before = [CheckpointRestorer(resume, average, user=user)] if resume else []
    before += [EMACallback(average)] if ema else []
    start = resume.step if resume else 0
    train(lit, Rows(), [*before, user, saving], steps=steps, start=start, **options)
    return rows, lit


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("manual", [False, True])
def test_every_hook_of_lightning_is_called_as_often_as_it_says(package, parts, manual, tmp_path):
    steps, saves = 3, 2  # at steps 2 and 3
    (one,) = build_callbacks({"callbacks": {"one": {"_target_": f"{package}.Count"}}}).values()
    run(tmp_path, {"one": one}, steps, lit=Manual() if manual else None, accumulate_grad_batches=parts)
    batches = dict.fromkeys(
        ("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward"), steps * parts
    )
    once = dict.fromkeys(
        (
            *("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end"),
            *("on_train_epoch_start", "on_train_epoch_end"),
        ),
        1,
    )
    updates = {
        "on_before_optimizer_step": steps * (2 if manual else 1),  # of each optimizer
        "on_before_zero_grad": 0 if manual else steps,  # Lightning does not call it for a module that does it itself
    }
    states = {"state_dict": 1 + saves, "on_save_checkpoint": saves, "on_load_checkpoint": 0, "load_state_dict": 0}
    expected = {**batches, **once, **updates, **states, "on_exception": 0, **dict.fromkeys(NEVER, 0)}
    assert expected.keys() == HOOKS
    assert Counter(one.calls) == Counter({name: number for name, number in expected.items() if number})
    again = type(one)()
    resume = load_checkpoint(tmp_path / "checkpoints" / "step-00000002")
    run(tmp_path, {"one": again}, steps, resume, lit=Manual() if manual else None, accumulate_grad_batches=parts)
    calls = Counter(again.calls)
    assert (calls["on_load_checkpoint"], calls["load_state_dict"]) == (1, 1)
    assert calls["on_train_batch_start"] == parts
    order = ["setup", "on_load_checkpoint", "load_state_dict", "on_fit_start", "on_train_start"]
    assert [name for name in again.calls if name in order] == order, "as Lightning restores its own checkpoints"


def test_hook_of_an_exception_is_called(package, tmp_path):
    (one,) = build_callbacks({"callbacks": {"one": {"_target_": f"{package}.Count"}}}).values()

    class Raise(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, {"one": one, "two": Raise()}, 3)
    assert one.calls.count("on_exception") == 1


class History(L.Callback):
    """Remembers every step in its state, and logs a number that depends on all of them."""

    def __init__(self):
        self.history, self.loaded = [], {}

    def state_dict(self):
        return {"history": self.history, "tensor": torch.tensor(float(len(self.history)))}

    def load_state_dict(self, state):
        self.history = state["history"]
        assert float(state["tensor"]) == len(self.history)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        checkpoint["of_history"] = checkpoint["global_step"]
        checkpoint["state_dict"].clear()  # a change of what is shown has no effect

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.loaded = dict(checkpoint)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.history.append((batch["step"], trainer.global_step, float(pl_module.line.weight)))
        pl_module.log("train/history", float(sum(weight for *_, weight in self.history)))
        trainer.logger.log_metrics({"train/direct": torch.tensor(float(batch["step"]))})


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("module", [Line, Manual])
def test_resumed_run_has_states_and_rows_of_one_never_stopped(module, parts, tmp_path):
    options = {"accumulate_grad_batches": parts, "ema": True}
    whole, first, second = History(), History(), History()
    rows, lit = run(tmp_path / "whole", {"mine": whole}, 6, lit=module(), **options)
    before, _ = run(tmp_path / "run", {"mine": first}, 4, lit=module(), **options)
    resume = load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[0])
    assert resume.step == 4
    after, other = run(tmp_path / "run", {"mine": second}, 6, resume, lit=module(), **options)
    assert second.history == whole.history
    assert [step for step, *_ in whole.history] == [step for step in range(6) for _ in range(parts)]
    updates = 2 if module is Manual else 1
    assert [done for _, done, _ in whole.history[parts - 1 :: parts]] == [updates * (step + 1) for step in range(6)]
    assert before + after == rows
    assert torch.equal(lit.line.weight, other.line.weight)
    assert second.loaded["of_history"] == second.loaded["global_step"] == 4 * updates
    assert second.loaded["state_dict"].keys() == {"line.weight", "line.bias"}
    assert second.loaded["callbacks"].keys() == {"mine"}


def test_logged_numbers_are_written_once_at_their_step(tmp_path):
    class Sometimes(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1:
                pl_module.log("train/second", 5.0)
                pl_module.log("train/hidden", 5.0, logger=False)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("train/mean", float(batch["step"]), on_step=False, on_epoch=True)
            if batch["step"] == 1:
                assert trainer.callback_metrics["train/hidden"] == 5.0
                trainer.logger.log_metrics({"train/typed": 1.0, "epoch": 0.5}, step=77)

    rows, _ = run(tmp_path, {"mine": Sometimes()}, 4, ema=True)
    assert rows == [(77, {"train/typed": 1.0, "epoch": 0.5}), (2, {"train/second": 5.0}), (4, {"train/mean": 1.5})]


def test_librarys_callback_logs_as_in_lightning(tmp_path):
    rows, _ = run(tmp_path, {"rate": LearningRateMonitor()}, 2)
    rates = [(step, value) for step, row in rows for name, value in row.items()]
    assert rates == [(1, 0.1), (1, 0.1), (2, 0.1)]  # at the start of the training and of each step, as train/lr
    logger = RunLogger(None, tmp_path / "run", lambda: 3)
    logger.log_metrics({"a": 1.0})  # another rank's
    assert (logger.save_dir, logger.version) == (str(tmp_path / "run"), "run")


def test_metrics_of_run_are_in_its_log(tmp_path):
    """As TrainingRun passes them on, with those of the training's own."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    whole = TrainingRun(tmp_path, {}, None, True, log, NoLogger(), 0.0)
    user = UserCallbacks({"mine": History()}, whole.log_metrics, tmp_path)
    train(Line(), Rows(), [user], steps=2)
    rows = read_metrics_log(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["train/direct"]) for row in rows if "train/direct" in row] == [(1, 0.0), (2, 1.0)]
    assert [row["step"] for row in rows if "train/history" in row] == [1, 2]
    assert {"train/direct", "train/history"} <= whole.written


@pytest.mark.parametrize("name", ["step", "wall", "resume"])
def test_metric_with_a_key_of_the_log_is_refused(name, tmp_path):
    class Clash(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log(name, 1.0)

    with pytest.raises(UserError, match=rf"^log\('{name}'\): step, wall, resume are keys of metrics.jsonl; choose"):
        run(tmp_path, {"mine": Clash()}, 1)
    with pytest.raises(UserError, match=rf"^log\('{name}'\)"):
        RunLogger(lambda step, values: None, tmp_path, lambda: 1).log_metrics({name: 1.0})


@pytest.mark.parametrize("parts", [1, 2])
def test_callback_can_end_the_training(parts, tmp_path, capsys):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx + 1 == 3 * parts

    _, lit = run(tmp_path / "three", {}, 3, accumulate_grad_batches=parts)
    assert "should_stop" not in capsys.readouterr().out
    _, stopped = run(tmp_path / "run", {"mine": Stop()}, 5, accumulate_grad_batches=parts)
    assert "\ncallbacks   trainer.should_stop was set: the training ends after step 3\n" in capsys.readouterr().out
    assert torch.equal(lit.line.weight, stopped.line.weight)


@pytest.mark.parametrize("parts", [1, 2])
def test_callbacks_see_the_updated_average_and_are_saved_after(parts, tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
                saved = (tmp_path / "checkpoints" / f"step-{batch['step'] + 1:08d}").exists()
                seen.append((find_average(trainer).updates, saved))

    run(tmp_path, {"mine": Look()}, 3, every=1, ema=True, accumulate_grad_batches=parts)
    assert seen == [(1, False), (2, False), (3, False)]
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step-00000003", "step-00000002"]


def test_best_by_a_callbacks_metric_is_of_its_step(tmp_path):
    from ldm.training.best import read_best
    from ldm.training.checkpoints import RetentionPolicy

    class Value(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            pl_module.log("val/mine", (3.0, 1.0, 2.0)[batch["step"]])

    written = {}
    user = UserCallbacks({"mine": Value()}, lambda step, values: written.update(values), tmp_path)
    keep = RetentionPolicy(2, None, lambda: written.pop("val/mine", None), "val/mine")
    train(Line(), Rows(), [user, CheckpointCallback(tmp_path, None, 3, 3, "", keep=keep, user=user)], steps=3)
    assert (read_best(tmp_path).step, read_best(tmp_path).value) == (2, 1.0)


def test_state_of_callbacks_that_come_and_go_is_reported(tmp_path, capsys):
    run(tmp_path, {"old": History()}, 2)
    resume = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0])
    capsys.readouterr()
    new = History()
    run(tmp_path, {"new": new}, 4, resume)
    said = capsys.readouterr().out
    assert "callbacks.new: no state in the checkpoint of step 2; it begins anew" in said
    assert "callbacks.old: its state in the checkpoint of step 2 is left out" in said
    assert [step for step, *_ in new.history] == [2, 3]


def test_checkpoint_without_callbacks_is_resumed_with_them(tmp_path):
    """As those from before there were callbacks."""
    train(Line(), Rows(), [CheckpointCallback(tmp_path / "checkpoints", None, 2, 2, "")], steps=2)
    new = History()
    run(tmp_path, {"new": new}, 4, load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0]))
    assert [(step, done) for step, done, _ in new.history] == [(2, 3), (3, 4)]


def test_state_that_cannot_be_loaded_is_refused_before_the_first_step(package, tmp_path):
    (one,) = build_callbacks({"callbacks": {"one": {"_target_": f"{package}.Unpicklable"}}}).values()
    lit = Line()
    with pytest.raises(UserError, match=r"^callbacks\.one\.state_dict\(\) cannot be in a checkpoint: expected tensors"):
        run(tmp_path, {"one": one}, 2, lit=lit)
    assert torch.equal(lit.line.weight, Line().line.weight)
    assert not list_checkpoints(tmp_path / "checkpoints")
    require_loadable({"a": [torch.ones(2), 1, "b", (None, True)]}, "this")


def test_user_callbacks_stand_between_groups_that_are_called_by_step():
    user = UserCallbacks({"a": L.Callback(), "b": L.Callback()}, print, None)
    first, last = L.Callback(), L.Callback()
    before, a, b, logged, after = arrange([first, user, last], 2)
    assert [a, b] == list(user.callbacks.values())
    assert (before.callbacks, after.callbacks) == ([first], [user, last])
    assert (before.parts, logged.parts, after.parts) == (2, 1, 2)
    (group,) = arrange([first, last], 3)
    assert (group.callbacks, group.parts) == ([first, last], 3)


REFUSED = {
    "counted.Cont": r"^callbacks\.a\._target_=counted\.Cont: counted has no 'Cont'; did you mean 'Count'\?$",
    "counted.no_callback": r"^callbacks\.a\._target_=counted\.no_callback gives int: expected a subclass of lightning",
    "counted.nothing.Count": r"^callbacks\.a\._target_=counted\.nothing\.Count: ",
    "lightning.pytorch.callbacks.ModelCheckpoint": "ldm writes the checkpoints itself; leave it out",
}


@pytest.mark.parametrize("target", REFUSED)
def test_what_is_no_callback_is_refused(package, target):
    with pytest.raises(UserError, match=REFUSED[target]) as error:
        build_callbacks({"callbacks": {"a": {"_target_": target}}})
    assert "\n" not in str(error.value)


def test_callbacks_are_built_by_key_in_order(package):
    node = {"_target_": f"{package}.Count"}
    assert list(build_callbacks({"callbacks": {"b": node, "off": None, "a": node}})) == ["b", "a"]
    assert build_callbacks({"callbacks": {}}) == build_callbacks({}) == {}


def test_hooks_that_no_training_calls_are_printed(package, capsys):
    config = {"callbacks": {"a": {"_target_": f"{package}.Count"}, "b": {"_target_": "lightning.Callback"}}}
    check_callbacks(config)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("callbacks.a: ")
    assert set(line.split(" will not")[0].removeprefix("callbacks.a: ").split(", ")) == NEVER


def test_callbacks_of_a_run_come_in_order_and_have_phases(tmp_path):
    """Those without a phase are of the hook's: the list says which, so that a phase lost by a rename is seen."""
    whole = TrainingRun(tmp_path, {"trainer": {}, "keep_best": "val/x"}, None, False, None, NoLogger(), 0.0)
    ema, lit = SimpleNamespace(), Line()
    every = whole.callbacks(
        "line",
        steps=4,
        lr_schedule=lambda step, total: 1.0,
        log_every=1,
        save_every=2,
        ema=ema,
        draw=print,
        averages={"ema_0.1": PowerEMA(lit, 0.1)},
        snapshot_every=2,
    )
    assert [(type(one).__name__, getattr(one, "phase", None)) for one in every] == [
        ("RankConsistencyCheck", None),
        ("StartupReport", "logging"),
        ("LearningRate", None),
        ("GradientGuard", None),
        ("EMACallback", "EMA"),
        ("EMACallback", "EMA"),
        ("MetricsRecorder", "logging"),
        ("Progress", "logging"),
        ("EMASnapshots", "saving"),
        ("UserCallbacks", None),
        ("CheckpointCallback", "saving"),
        ("SampleGridCallback", "saving"),
        ("BestLater", "saving"),
        ("GracefulStop", None),
    ]
