from types import SimpleNamespace

import pytest
import torch

from ldm.training.callbacks import LOSS_BY_T, MetricsRecorder
from ldm.training.diffusion import loss_by_t
from ldm.training.profiler import PhaseProfiler


def test_metrics_recorder_splits_loss_by_time():
    """Over two steps: each part's mean is that of its rows, of any number; a part without one is not written."""
    rows = []
    record = MetricsRecorder(lambda step, values: rows.append(values), 2, 2)
    trainer = SimpleNamespace(
        is_global_zero=True, profiler=PhaseProfiler(), optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])]
    )
    steps = [([1.0, 2.0, 3.0], [0.0, 0.24, 0.6]), ([6.0, 5.0, 7.0], [0.1, 0.75, 1.0])]
    for step, (loss, t) in enumerate(steps):
        loss, t = torch.tensor(loss), torch.tensor(t)
        record.on_train_batch_end(
            trainer, None, {"loss": loss.mean(), LOSS_BY_T: loss_by_t(loss, t)}, {"step": step, "total": 3}, step
        )
    told = {name: value for name, value in rows[0].items() if name.startswith("train/loss")}
    assert told == pytest.approx(
        {"train/loss": 4.0, "train/loss/t=0-0.25": 3.0, "train/loss/t=0.5-0.75": 3.0, "train/loss/t=0.75-1": 6.0}
    )
