import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ldm.checkpoint.step import checkpoint_step, latest_valid_checkpoint, list_checkpoints, load_checkpoint
from ldm.diffusion.objective import LossSecondMoment, VLBObjective
from ldm.training.best import Best, read_best
from ldm.training.checkpoints import BestLater, CheckpointCallback, RetentionPolicy


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
    CheckpointCallback(tmp_path, None, 1, 1, "", load_checkpoint(latest_valid_checkpoint(tmp_path)[0])).on_fit_start(
        trainer, after
    )
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
    """As that of a picture, which is after the checkpoint: the best is of step 2, whether that is saved anyway or not."""
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
    assert not capsys.readouterr().out, "nothing of its group was written yet"
    written.update({"train/loss", "train/lr"})
    for step in (1, 2):
        saving.on_train_batch_end(TRAINER, Lit(), None, {"step": step}, 0)
    text = capsys.readouterr().out.strip()
    problem = "keep_best=-train/nosuch: no such number was written, only train/loss, train/lr"
    assert text == f"{problem} (up to step 2): no best checkpoint so far"
    saving.on_train_end(TRAINER, None)
    assert capsys.readouterr().out.strip() == f"{problem}: there is no best checkpoint"
