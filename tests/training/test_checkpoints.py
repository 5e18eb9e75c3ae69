import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.checkpoint.step import checkpoint_step, latest_valid_checkpoint, list_checkpoints, load_checkpoint
from ldm.diffusion.objective import LossSecondMoment, VLBObjective
from ldm.ema import PowerEMA
from ldm.errors import ConfigError, UserError
from ldm.io import atomic
from ldm.training.best import Best, read_best
from ldm.training.checkpoints import (
    BestLater,
    CheckpointCallback,
    CheckpointRestorer,
    EMASnapshots,
    RetentionPolicy,
)


class Plain:
    """A precision with nothing to keep."""

    state_dict, load_state_dict = dict, dict


TRAINER = SimpleNamespace(is_global_zero=True, optimizers=[], precision_plugin=Plain())


class Lit(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.objective = (
            nn.Linear(2, 2),
            LossSecondMoment(VLBObjective(timestep_sampling=None), T=3, history=2),
        )


def test_checkpoint_preserves_objective_state(tmp_path):
    before, after, trainer = Lit(), Lit(), SimpleNamespace(is_global_zero=True, optimizers=[], precision_plugin=Plain())
    before.objective.update_history(torch.tensor([0, 2, 2, 0, 1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    CheckpointCallback(tmp_path, None, 1, 1, "").on_train_batch_end(trainer, before, None, {"step": 0}, 0)
    CheckpointRestorer(load_checkpoint(latest_valid_checkpoint(tmp_path)[0]), None).on_fit_start(trainer, after)
    assert torch.equal(after.objective.count, torch.tensor([2, 2, 2]))
    assert torch.equal(after.objective.probabilities(), before.objective.probabilities())
    assert torch.equal(after.model.weight, before.model.weight)


def test_retention_policy_preserves_newest_periodic_and_best(tmp_path):
    """The newest two, every fourth, and the one whose number was lowest, by now the third."""
    values = iter([None, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    run_steps(
        CheckpointCallback(tmp_path, None, 1, 100, "", keep=RetentionPolicy(2, 4, lambda: next(values), "val/fd")), 10
    )
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [10, 9, 8, 4, 3]
    assert json.loads((tmp_path / "best.json").read_text()) == {"metric": "val/fd", "step": 3, "value": 1.0}


def run_steps(saving: CheckpointCallback, number: int, *later: BestLater) -> None:
    """The hooks of so many steps and of the end."""
    for step in range(number):
        for one in (saving, *later):
            one.on_train_batch_end(TRAINER, Lit(), None, {"step": step}, 0)
    saving.on_train_end(TRAINER, None)


def test_new_best_is_saved_between_saves(tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    run_steps(
        CheckpointCallback(tmp_path, None, 4, 8, "", keep=RetentionPolicy(2, None, lambda: next(values), "val/fd")), 8
    )
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [8, 4, 2]
    assert load_checkpoint(tmp_path / "step-00000002").step == 2
    assert read_best(tmp_path) == Best("val/fd", 2, 1.0)


@pytest.mark.parametrize(
    "values", [[math.nan, 2.0, 3.0], [2.0, -math.inf, math.nan], [math.inf, 3.0, 2.0], [math.nan, math.nan, -math.inf]]
)
def test_non_finite_value_is_never_best(values, tmp_path, capsys):
    turn, finite = iter(values), [value for value in values if math.isfinite(value)]
    run_steps(
        CheckpointCallback(
            tmp_path, None, 1, 3, "", keep=RetentionPolicy(2, None, lambda: next(turn), "val/fd", lambda: {"val/fd"})
        ),
        3,
    )
    assert latest_valid_checkpoint(tmp_path)[0].name == "step-00000003"
    best = Best("val/fd", values.index(2.0) + 1, 2.0) if finite else None
    assert read_best(tmp_path) == best
    assert (
        "keep_best=val/fd: the number was never finite: there is no best checkpoint" in capsys.readouterr().out
    ) == (not finite)


@pytest.mark.parametrize(
    "left", ['{"metric": "-perf/images_per_s", "step": 1, "value": -70.0}', '{"step": 1, "value": -70.0}', '{"met']
)
def test_best_of_other_metric_is_ignored(left, tmp_path):
    """Nor one of which no metric is known, nor half a file."""
    (tmp_path / "best.json").write_text(left)
    values = iter([3.0, 2.0, 4.0])
    run_steps(
        CheckpointCallback(tmp_path, None, 1, 3, "", keep=RetentionPolicy(2, None, lambda: next(values), "train/loss")),
        3,
    )
    assert read_best(tmp_path) == Best("train/loss", 2, 2.0)


@pytest.mark.parametrize("every", [1, 3])
def test_value_written_after_save_belongs_to_its_step(every, tmp_path):
    """As that of a sample grid, which comes after the checkpoint: the best is of step 2, saved anyway or not."""
    values = iter([None, 3.0, None, 1.0, None, 2.0])
    saving = CheckpointCallback(
        tmp_path, None, every, 3, "", keep=RetentionPolicy(2, None, lambda: next(values), "val/psnr")
    )
    run_steps(saving, 3, BestLater(saving))
    assert read_best(tmp_path) == Best("val/psnr", 2, 1.0)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [3, 2]


def test_former_best_stays_until_new_one_is_saved(tmp_path, monkeypatch):
    """A save that fails leaves the former best, and best.json says so."""
    values = iter([1.0, 2.0, 2.0, 0.5])
    saving = CheckpointCallback(tmp_path, None, 1, 9, "", keep=RetentionPolicy(2, None, lambda: next(values), "val/fd"))
    run_steps(saving, 3)
    monkeypatch.setattr(
        "ldm.checkpoint.step._require_disk_space", lambda *args: (_ for _ in ()).throw(OSError(28, "no space"))
    )
    with pytest.raises(OSError, match="no space"):
        saving.on_train_batch_end(TRAINER, Lit(), None, {"step": 3}, 0)
    assert read_best(tmp_path) == Best("val/fd", 1, 1.0)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [3, 2, 1]


def test_missing_metric_is_reported_once_and_at_end(tmp_path, capsys):
    written = set()
    saving = CheckpointCallback(
        tmp_path, None, 1, 3, "", keep=RetentionPolicy(2, None, lambda: None, "-train/nosuch", lambda: written)
    )
    saving.on_train_batch_end(TRAINER, Lit(), None, {"step": 0}, 0)
    written.add("trained/loss")
    saving.on_train_batch_end(TRAINER, Lit(), None, {"step": 0}, 0)
    assert not capsys.readouterr().out, "nothing of its group was written yet"
    written.clear()
    written.update({"train/loss", "train/lr"})
    for step in (1, 2):
        saving.on_train_batch_end(TRAINER, Lit(), None, {"step": step}, 0)
    text = capsys.readouterr().out.strip()
    problem = "keep_best=-train/nosuch: no such number was written, only train/loss, train/lr"
    assert text == f"{problem} (up to step 2): no best checkpoint so far"
    saving.on_train_end(TRAINER, None)
    assert capsys.readouterr().out.strip() == f"{problem}: there is no best checkpoint"


class Scaled:
    """A precision whose state is a loss scale."""

    def __init__(self, scale):
        self.scale = scale

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        self.scale = state["scale"]


class Run:
    """A module, its averages and its optimizer, after some steps on constant gradients."""

    def __init__(self, lr=0.5, steps=0, scale=1.0, chief=True):
        torch.manual_seed(steps)
        self.lit = Lit()
        self.optimizer = torch.optim.SGD(self.lit.parameters(), lr, momentum=0.5)
        self.ema, self.snapshots = PowerEMA(self.lit, 0.1), {"ema_0.05": PowerEMA(self.lit, 0.05)}
        precision = Scaled(scale)
        self.trainer = SimpleNamespace(is_global_zero=chief, optimizers=[self.optimizer], precision_plugin=precision)
        for _ in range(steps):
            for p in self.lit.parameters():
                p.grad = torch.ones_like(p)
            self.optimizer.step()
            for average in (self.ema, *self.snapshots.values()):
                average.update()

    def callback(self, folder, ema=True, averages=True, every=1, total=1):
        averages = self.snapshots if averages else {}
        return CheckpointCallback(folder, self.ema if ema else None, every, total, "", averages=averages)

    def restore(self, checkpoint, ema=True, averages=True):
        averages = self.snapshots if averages else {}
        CheckpointRestorer(checkpoint, self.ema if ema else None, averages).on_fit_start(self.trainer, self.lit)


def test_checkpoint_restores_weights_averages_moments_and_loss_scale(tmp_path):
    before, after = Run(steps=3, scale=8.0), Run(lr=0.25, steps=2)
    before.optimizer.param_groups[0]["base_lr"] = 0.5
    before.callback(tmp_path).on_train_batch_end(before.trainer, before.lit, None, {"step": 0}, 0)
    after.restore(load_checkpoint(latest_valid_checkpoint(tmp_path)[0]))
    for a, b in zip(before.lit.parameters(), after.lit.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(before.optimizer.state[a]["momentum_buffer"], after.optimizer.state[b]["momentum_buffer"])
    for a, b in ((before.ema, after.ema), (before.snapshots["ema_0.05"], after.snapshots["ema_0.05"])):
        assert all(torch.equal(value, b.shadow[name]) for name, value in a.shadow.items())
        assert a.updates == b.updates == 3
    assert after.trainer.precision_plugin.scale == 8.0
    (group,) = after.optimizer.param_groups
    assert group["lr"] == 0.25, "the config's rate, not the checkpoint's"
    assert "base_lr" not in group


def test_checkpoint_without_averages_restores_the_rest(tmp_path):
    before, after = Run(steps=3), Run(steps=2)
    saved = before.callback(tmp_path, ema=False, averages=False)
    saved.on_train_batch_end(before.trainer, before.lit, None, {"step": 0}, 0)
    checkpoint = load_checkpoint(latest_valid_checkpoint(tmp_path)[0])
    assert set(checkpoint.tensors) == {"model"}
    after.restore(checkpoint, ema=False, averages=False)
    assert torch.equal(after.lit.model.weight, before.lit.model.weight)
    with pytest.raises(UserError, match=r"snapshot_every: the checkpoint of step 1 has no ema_0\.05"):
        after.restore(checkpoint, ema=False)


def test_checkpoints_are_saved_every_so_often_and_at_the_end_by_first_process(tmp_path):
    for chief, folder in ((True, tmp_path / "first"), (False, tmp_path / "other")):
        folder.mkdir()
        run = Run(chief=chief)
        callback = run.callback(folder, every=3, total=7)
        callback.keep = RetentionPolicy(last=10)
        for step in range(7):
            callback.on_train_batch_end(run.trainer, run.lit, None, {"step": step}, 0)
        steps = [7, 6, 3] if chief else []
        assert [checkpoint_step(path) for path in list_checkpoints(folder)] == steps


@pytest.mark.parametrize("chief", [True, False])
def test_snapshots_are_written_every_so_often_and_at_the_end(chief, tmp_path):
    run = Run(steps=2, chief=chief)
    snapshots = EMASnapshots(tmp_path, run.snapshots, 2, 5)
    for step in range(5):
        snapshots.on_train_batch_end(run.trainer, run.lit, None, {"step": step}, 0)
    names = [f"ema_0.05-{step:08d}.safetensors" for step in (2, 4, 5)] if chief else []
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        saved = atomic.read_tensors(tmp_path / name)
        assert all(torch.equal(value, saved[key]) for key, value in run.snapshots["ema_0.05"].shadow.items())


def test_snapshots_of_no_steps_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="snapshot_every=0: expected a number of steps"):
        EMASnapshots(tmp_path, {}, 0, 5)
    EMASnapshots(tmp_path, {}, 1, 5)


@pytest.mark.parametrize(("value", "steps"), [(None, [4, 3, 1]), (lambda: None, [4, 3])])
def test_former_best_stays_unless_another_metric_decides(value, steps, tmp_path):
    saving = CheckpointCallback(tmp_path, None, 1, 4, "", keep=RetentionPolicy(2, None, value, "train/loss"))
    run_steps(saving, 1)
    atomic.write_json(tmp_path / "best.json", {"metric": "val/fd", "step": 1, "value": 1.0})
    for step in (1, 2, 3):
        saving.on_train_batch_end(TRAINER, Lit(), None, {"step": step}, 0)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == steps
