from types import SimpleNamespace

import torch
from torch import nn

from ldm.diffusion.objective import Likelihood, LossSecondMoment
from ldm.durable import latest_valid, load_step
from ldm.training.callbacks import Checkpoints


class Lit(nn.Module):
    def __init__(self):
        super().__init__()
        self.model, self.objective = nn.Linear(2, 2), LossSecondMoment(Likelihood(times=None), T=3, history=2)


def test_a_training_goes_on_with_what_its_objective_remembers(tmp_path):
    before, after, trainer = Lit(), Lit(), SimpleNamespace(is_global_zero=True, optimizers=[])
    before.objective.remember(torch.tensor([0, 2, 2, 0, 1, 1]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    Checkpoints(tmp_path, None, 1, 1, "").on_train_batch_end(trainer, before, None, {"step": 0}, 0)
    Checkpoints(tmp_path, None, 1, 1, "", load_step(latest_valid(tmp_path)[0])).on_fit_start(trainer, after)
    assert torch.equal(after.objective.count, torch.tensor([2, 2, 2]))
    assert torch.equal(after.objective.probabilities(), before.objective.probabilities())
    assert torch.equal(after.model.weight, before.model.weight)
