"""FSDP2 on processors: two processes that share out a model train it as one does, are killed, and go on as two or as
one.
"""

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import harm
import pytest
from smoke import process, processes

from ldm.io import atomic
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
TWO = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32")


def ended(folder: Path) -> tuple[list[dict], dict]:
    """The losses and the final averaged weights of the one run in a folder."""
    (run,) = (folder / "runs").iterdir()
    rows = [
        {key: row[key] for key in row if key.startswith("train/")}
        for row in metrics_log.read_metrics_log(run / "metrics.jsonl")
    ]
    return rows, atomic.read_tensors(run / "weights.safetensors")


@pytest.mark.slow
def test_sharded_training_matches_one_process_and_resumes_in_any_number(smoke, tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "then one")]
    for folder in folders:
        shutil.copytree(smoke.kept, folder / "cache")
    assert processes((*DIFFUSION, *ONE), cwd=folders[0])[0].returncode == 0
    killed = partial(harm.after_step, 5, partial(harm.signals, (signal.SIGKILL,)), (1,))
    done = processes(*[(*DIFFUSION, *TWO)] * 2, cwd=folders[1], harm=killed)
    assert done[1].returncode == -signal.SIGKILL, done
    assert done[0].returncode != 0
    shutil.copytree(folders[1] / "runs", folders[2] / "runs")
    for folder, job in ((folders[1], TWO), (folders[2], ONE)):
        done = processes(*[(*DIFFUSION, *job)] * (2 if job is TWO else 1), cwd=folder)
        assert not any(one.returncode for one in done), done
        assert "resuming from step 4 " in done[0].stdout
    expected, weights = ended(folders[0])
    for folder in folders[1:]:
        rows, other = ended(folder)
        for row, wanted in zip(rows, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)
        assert weights.keys() == other.keys()
        assert max(float((other[name] - value).abs().max()) for name, value in weights.items()) < 1e-5


@pytest.mark.slow
def test_sharded_training_builds_its_dependencies(smoke, tmp_path):
    """With nothing in the cache: the judge by one process, the first stage by two under DDP, the diffusion model
    sharded.
    """
    done = process("train.py", "budget=smoke", *TWO, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = [line for line in done.stdout.splitlines() if line.startswith("trainer ")]
    assert [line.split("; ")[1] for line in printed] == [
        "LitEvaluator is trained with strategy=auto",
        "LitAutoencoder is trained with strategy=ddp",
    ]
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == smoke.run.name
    assert json.loads((run / "metrics.json").read_text())["n"] == 20
    assert list((run / "grids").glob("*.png"))
