"""Losses that are not numbers: skipped by all ranks together and counted, or the end with exit code 3, its evidence on
the disk.
"""

import json
import math
import shutil
from functools import partial

import harm
import pytest
from smoke import processes

from ldm.checkpoint.step import latest_valid_checkpoint, load_checkpoint
from ldm.io import atomic
from ldm.runs import metrics_log

SIZES = (
    "training.steps=6",
    "training.save_every=2",
    "training.sample_every=100",
    "training.log_every=1",
    "metrics=none",
)
STAGES = {
    "diffusion": ("train.py", "budget=smoke", *SIZES),
    "autoencoder": (
        *(
            "train.py",
            "budget=smoke",
            "training=autoencoder",
            "~training.score",
            "training.batch_size=8",
            "training.discriminator_start=0",
        ),
        *SIZES,
    ),
}
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_nonfinite_loss_on_one_rank_skips_step_on_both(stage, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    done = processes(*[(*STAGES[stage], *TWO)] * 2, cwd=tmp_path, harm=partial(harm.not_a_number, (3,), (1,)))
    assert [one.returncode for one in done] == [0, 0], done
    (evidence,) = tmp_path.rglob("nonfinite.json")
    rows = metrics_log.read_metrics_log(evidence.parent / "metrics.jsonl")
    assert [(row["step"], row.get("train/skipped")) for row in rows] == [
        (step, 1 if step == 3 else None) for step in range(1, 7)
    ]
    assert len(json.loads(evidence.read_text())["batch"]["epoch, index"]) == 8
    assert all(
        value.isfinite().all() for value in atomic.read_tensors(evidence.parent / "weights.safetensors").values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_repeated_nonfinite_loss_ends_with_exit_code_3_and_valid_checkpoint(stage, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    (done,) = processes(
        (*STAGES[stage], "max_skipped_steps=3", "trainer=cpu"),
        cwd=tmp_path,
        harm=partial(harm.not_a_number, range(3, 7), (0,)),
    )
    assert done.returncode == 3, done.stdout
    assert "error: the gradients of 3 steps in a row, up to step 5, are not finite" in done.stdout
    assert "Traceback" not in done.stdout
    (evidence,) = tmp_path.rglob("nonfinite.json")
    assert str(evidence.relative_to(tmp_path)) in done.stdout
    assert json.loads(evidence.read_text())["step"] == 5
    assert not (evidence.parent / "metrics.json").is_file()
    step = load_checkpoint(latest_valid_checkpoint(evidence.parent / "checkpoints")[0])
    assert step.step == 4
    assert all(value.isfinite().all() for state in step.tensors.values() for value in state.values())
    losses = [
        row["train/loss"]
        for row in metrics_log.read_metrics_log(evidence.parent / "metrics.jsonl")
        if "train/loss" in row
    ]
    assert all(map(math.isfinite, losses))
