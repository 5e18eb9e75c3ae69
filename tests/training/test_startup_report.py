"""What a training says of itself when it begins."""

import re
from functools import partial

import pytest
from rows import Line, Rows, train

from ldm.training.callbacks import LearningRate
from ldm.training.lr import cosine
from ldm.training.startup_report import MEASURED_STEPS, MIN_REMAINING_STEPS, StartupReport


@pytest.mark.parametrize("accumulate", [1, 2])
def test_startup_report_prints_size_batch_and_peak_rate_once(accumulate, capfd):
    steps, schedule = MEASURED_STEPS + 1 + MIN_REMAINING_STEPS, partial(cosine, warmup=4, end=0.5)
    around = [StartupReport("a line", steps, schedule, accumulate), LearningRate(schedule, steps)]
    train(Line(), Rows(), around, steps=steps, accumulate_grad_batches=accumulate)
    first, *others = [line for line in capfd.readouterr().out.splitlines() if line.startswith("a line")]
    peak = 0.1 * max(schedule(step, steps) for step in range(steps))
    parts = " (2 batches x 2)" if accumulate == 2 else ""
    assert first == f"a line      2 parameters, 14 steps of 4 images{parts}, learning rate up to {peak:.3g}"
    assert len(others) == 1
    assert re.fullmatch(r"a line      about [\d,.e+]+ images/s to expect, 0 s to go", others[0])


def test_startup_report_after_resume_covers_remaining_steps(capfd):
    schedule = partial(cosine, end=0.0)
    train(Line(), Rows(), [StartupReport("a line", 8, schedule)], steps=8, start=4)
    (said,) = [
        line for line in capfd.readouterr().out.splitlines() if line.startswith("a line")
    ]  # too little for an estimate
    assert said.endswith(f"learning rate up to {0.1 * schedule(4, 8):.3g}")
