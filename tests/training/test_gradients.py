"""What is not finite is skipped, counted, written down, and in the end stops the training."""

import json
import math

import pytest
from rows import Line, Rows, Seen, train

from ldm.data.stream import BatchStream
from ldm.errors import NonFiniteError
from ldm.training.callbacks import MetricsRecorder
from ldm.training.gradients import NONFINITE_REPORT, GradientGuard

KEYS = [part.samples for part in BatchStream(16, 4, 6)]  # of the batches of the trainings here


def watched(tmp_path, bad, patience=3, every=1, accumulate=1):
    gradients, seen, rows, lit = GradientGuard(tmp_path, patience), Seen(), [], Line(bad)
    record = MetricsRecorder(lambda step, values: rows.append((step, values)), every, 6, gradients)
    train(lit, Rows(), [gradients, record, seen], steps=6, accumulate_grad_batches=accumulate)
    return seen, rows


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradient_guard_skips_one_bad_step(tmp_path, accumulate):
    seen, rows = watched(tmp_path, [KEYS[2][1]], accumulate=accumulate)
    assert seen.weights[2] == seen.weights[1]
    assert all(math.isfinite(weight) for weight in seen.weights)
    assert len(set(seen.weights)) == 5
    assert [step for step, values in rows if values.get("train/skipped")] == [3]
    assert all(values["train/grad_norm"] > 0 for step, values in rows if step != 3)
    evidence = json.loads((tmp_path / NONFINITE_REPORT).read_text())
    assert evidence["step"] == 3
    assert evidence["gradients"] == ["line.weight", "line.bias"]
    assert [tuple(key) for key in evidence["batch"]["epoch, index"]] == KEYS[2]


def test_recorder_excludes_skipped_steps(tmp_path):
    _, rows = watched(tmp_path, [KEYS[2][1]], every=3)
    (_, first), (_, second) = rows
    assert first["train/skipped"] == 1
    assert math.isfinite(first["train/loss"])
    assert "train/skipped" not in second


def test_gradient_guard_ends_training_after_repeated_skips(tmp_path):
    with pytest.raises(NonFiniteError, match=r"3 steps in a row, up to step 5, .*line.weight.*nonfinite.json"):
        watched(tmp_path, [key for step in (0, 2, 3, 4) for key in KEYS[step]])
    assert json.loads((tmp_path / NONFINITE_REPORT).read_text())["skipped_in_a_row"] == 3


def test_gradient_guard_norm_is_global_norm(tmp_path):
    class Norm(GradientGuard):
        def on_before_optimizer_step(self, trainer, lit, optimizer):
            self.expected = math.sqrt(sum(float(p.grad.square().sum()) for p in lit.parameters()))
            super().on_before_optimizer_step(trainer, lit, optimizer)
            assert float(self.norms["grad_norm"]) == pytest.approx(self.expected, rel=1e-6)

    train(Line(), Rows(), [Norm(tmp_path, 1)], steps=3)
