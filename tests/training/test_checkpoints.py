import json
from types import SimpleNamespace

import torch
from torch import nn

from ldm.diffusion.objective import Likelihood, LossSecondMoment
from ldm.durable import latest_valid, load_step, step_of, steps
from ldm.training.callbacks import Checkpoints, Keep


class Plain:
    """A precision with nothing to keep."""

    state_dict, load_state_dict = dict, dict


class Lit(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.objective = nn.Linear(2, 2), LossSecondMoment(Likelihood(times=None), T=3, history=2)


def test_a_training_goes_on_with_what_its_objective_remembers(tmp_path):
    before, after, trainer = Lit(), Lit(), SimpleNamespace(is_global_zero=True, optimizers=[], precision_plugin=Plain())
    before.objective.remember(torch.tensor([0, 2, 2, 0, 1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    Checkpoints(tmp_path, None, 1, 1, "").on_train_batch_end(trainer, before, None, {"step": 0}, 0)
    Checkpoints(tmp_path, None, 1, 1, "", load_step(latest_valid(tmp_path)[0])).on_fit_start(trainer, after)
    assert torch.equal(after.objective.count, torch.tensor([2, 2, 2]))
    assert torch.equal(after.objective.probabilities(), before.objective.probabilities())
    assert torch.equal(after.model.weight, before.model.weight)


def test_which_checkpoints_stay(tmp_path):
    """The newest two, every fourth, and the one whose number was lowest, by now the third."""
    trainer = SimpleNamespace(is_global_zero=True, optimizers=[], precision_plugin=Plain())
    values = iter([None, 3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    saving = Checkpoints(tmp_path, None, 1, 100, "", keep=Keep(2, 4, lambda: next(values)))
    for step in range(10):
        saving.on_train_batch_end(trainer, Lit(), None, {"step": step}, 0)
    assert [step_of(path) for path in steps(tmp_path)] == [10, 9, 8, 4, 3]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 3, "value": 1.0}
