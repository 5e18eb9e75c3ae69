"""Two processes of which one dies, ones that were started differently, and a training that goes on with another number
of them.
"""

import shutil
import signal
import time
from functools import partial
from pathlib import Path

import harm
import pytest
import torch
from smoke import processes

from ldm.checkpoint.step import Checkpoint, load_checkpoint
from ldm.runs import metrics_log

DIFFUSION = (
    "train.py",
    "budget=smoke",
    "metrics=none",
    "training.steps=6",
    "training.save_every=2",
    "training.sample_every=100",
)
ONE = ("trainer=cpu",)
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32")


def ended(folder: Path) -> tuple[list[dict], Checkpoint]:
    """The losses and the last step of the one run in a folder."""
    (run,) = (folder / "runs").iterdir()
    rows = [
        {key: row[key] for key in row if key.startswith("train/")}
        for row in metrics_log.read_metrics_log(run / "metrics.jsonl")
    ]
    return rows, load_checkpoint(run / "checkpoints" / "step-00000006")


@pytest.fixture(scope="module")
def whole(smoke, tmp_path_factory):
    """A training by two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(smoke.kept, folder / "cache")
    done = processes(*[(*DIFFUSION, *TWO)] * 2, cwd=folder)
    assert [one.returncode for one in done] == [0, 0], done
    return ended(folder)


@pytest.mark.slow
@pytest.mark.parametrize("again", [2, 1])
def test_killed_rank_ends_other_and_resumes_to_same_weights(again, whole, smoke, tmp_path):
    """Taken up by two processes it is bit for bit the training never killed; by one, the same samples and to rounding
    the same losses.
    """
    shutil.copytree(smoke.kept, tmp_path / "cache")
    killed = partial(harm.after_step, 5, partial(harm.signals, (signal.SIGKILL,)), (1,))
    done = processes(*[(*DIFFUSION, *TWO)] * 2, cwd=tmp_path, harm=killed)
    assert done[1].returncode == -signal.SIGKILL
    assert done[0].returncode == 1, done[0].stdout
    done = processes(*[(*DIFFUSION, *(TWO if again == 2 else ONE))] * again, cwd=tmp_path)
    assert [one.returncode for one in done] == [0] * again, done
    assert "resuming from step 4 " in done[0].stdout
    (losses, step), (expected, last) = ended(tmp_path), whole
    for row, other in zip(losses, expected, strict=True):
        assert row == (other if again == 2 else pytest.approx(other, rel=1e-5))
    if again == 2:
        assert all(
            torch.equal(step.tensors[kind][name], value)
            for kind, held in last.tensors.items()
            for name, value in held.items()
        )


@pytest.mark.slow
def test_killed_training_leaves_no_data_workers(smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    (killed,) = processes(
        (*DIFFUSION, *ONE, "trainer.num_workers=2"),
        cwd=tmp_path,
        harm=partial(harm.after_step, 3, harm.killed_beside, (0,)),
    )
    assert killed.returncode == -signal.SIGKILL
    readers = [int(word) for word in (tmp_path / "readers.txt").read_text().split()]
    assert len(readers) == 2
    end = time.monotonic() + 600
    while any(Path(f"/proc/{reader}").exists() for reader in readers):
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
def test_ranks_with_different_configs_refuse_to_start(smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    jobs = [(*DIFFUSION, *TWO, f"training.optimizer.lr={lr}") for lr in (1e-3, 2e-3)]
    done = processes(*jobs, cwd=tmp_path)
    assert [one.returncode for one in done] == [2, 2], done
    assert "differ in the config" in done[0].stdout
    assert "differ in the config" in done[1].stdout
