"""Told to stop, a training keeps its step, says so by its exit code, and the same command goes on: one process, two,
one of two.
"""

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import harm
import pytest
from smoke import processes

from ldm.checkpoint import step
from ldm.io import atomic
from ldm.runs import metrics_log

DIFFUSION = (
    "train.py",
    "budget=smoke",
    "metrics=none",
    "training.steps=6",
    "training.save_every=100",
    "training.sample_every=100",
)
ALONE, TWO = ("trainer=cpu",), ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32")
TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


def stopped(smoke, folder: Path, numbers: tuple[int, ...], ranks: tuple[int, ...], world: int) -> list:
    """The processes of a run to which signals come after its third step."""
    shutil.copytree(smoke.kept, folder / "cache")
    told = partial(harm.after_step, 3, partial(harm.signals, numbers), ranks)
    return processes(*[(*DIFFUSION, *(ALONE if world == 1 else TWO))] * world, cwd=folder, harm=told)


def steps(folder: Path) -> list[str]:
    return [path.name for path in step.list_checkpoints(next(folder.glob("runs/*")) / "checkpoints")]


CASES = {
    "SIGUSR1": ((USR1,), (0,), 1, 85),
    "SIGTERM to rank 1 of 2": ((TERM,), (1,), 2, 85),
    "SIGTERM to both, twice": ((TERM, TERM), (0, 1), 2, 85),
    "SIGUSR1 to rank 1 of 2": ((USR1,), (1,), 2, 85),
    "Ctrl-C to rank 0 of 2": ((INT,), (0,), 2, 130),
    "Ctrl-C to both": ((INT,), (0, 1), 2, 130),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_signal_saves_step_and_resumes(case, smoke, tmp_path):
    numbers, ranks, world, code = CASES[case]
    done = stopped(smoke, tmp_path, numbers, ranks, world)
    assert [one.returncode for one in done] == [code] * world, done
    assert "after step 3, which is saved" in done[0].stdout
    assert not any("Traceback" in one.stdout for one in done)
    assert steps(tmp_path) == ["step-00000003"]
    assert not list(tmp_path.glob("runs/*/metrics.json"))
    again = processes(*[(*DIFFUSION, *(ALONE if world == 1 else TWO))] * world, cwd=tmp_path)
    assert [one.returncode for one in again] == [0] * world, again
    assert "resuming from step 3 " in again[0].stdout
    (journal,) = tmp_path.glob("runs/*/metrics.jsonl")
    assert [row["step"] for row in metrics_log.read_metrics_log(journal)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_second_ctrl_c_exits_at_once(world, smoke, tmp_path):
    done = stopped(smoke, tmp_path, (INT, INT), tuple(range(world)), world)
    assert [one.returncode for one in done] == [-INT] * world, done
    assert steps(tmp_path) == []


@pytest.mark.slow
def test_run_ended_after_last_step_resumes_with_learned_weights(smoke, tmp_path):
    """Nothing is left to train, and the weights that are drawn from and kept are the checkpoint's, not fresh ones."""
    shutil.copytree(smoke.run, run := tmp_path / "runs" / smoke.run.name)
    shutil.copytree(smoke.kept, tmp_path / "cache")
    learned = atomic.read_tensors(run / "weights.safetensors")
    for name in ("metrics.json", "weights.safetensors"):
        os.remove(run / name)
    (done,) = processes(("train.py", "budget=smoke"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "resuming from step 2 " in done.stdout
    again = atomic.read_tensors(run / "weights.safetensors")
    assert all((again[name] == learned[name]).all() for name in learned)
