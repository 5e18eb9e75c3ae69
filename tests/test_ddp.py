"""Two processes train both stages as one does: the same losses at the same global batch."""

import shutil
from pathlib import Path

import pytest
import torch
from smoke import process, processes

from ldm.checkpoint.step import list_checkpoints
from ldm.io import atomic
from ldm.runs import metrics_log

DIFFUSION = ("budget=smoke", "training.sample_every=100", "metrics=none")
AUTOENCODER = (
    "budget=smoke",
    "training=autoencoder",
    "~training.score",
    "training.discriminator_start=0",
    "training.batch_size=8",
)
AUTOENCODER += ("training.log_every=1", "training.sample_every=100", "training.save_every=100", "metrics=none")
STAGES = {"diffusion": DIFFUSION, "autoencoder with its GAN": AUTOENCODER}
CPU = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision='32'")
LIMIT = {"64": 1e-9, "32": 1e-5}


def rows_of(run: Path) -> int:
    return len(metrics_log.read_metrics_log(run / "metrics.jsonl")) if (run / "metrics.jsonl").is_file() else 0


def rows(folder: Path, steps: int) -> list[dict]:
    (journal,) = [p for p in folder.rglob("metrics.jsonl") if len(metrics_log.read_metrics_log(p)) == steps]
    return [{k: v for k, v in row.items() if k.startswith("train/")} for row in metrics_log.read_metrics_log(journal)]


def assert_same(one: list[dict], two: list[dict], limit: float) -> None:
    for step, (a, b) in enumerate(zip(one, two, strict=True), 1):
        assert a.keys() == b.keys()
        for name in a:
            assert abs(a[name] - b[name]) <= limit * max(abs(a[name]), 1e-3), (step, name, a[name], b[name])


@pytest.mark.parametrize("precision", ["64", pytest.param("32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", [s if "GAN" in s else pytest.param(s, marks=pytest.mark.slow) for s in STAGES])
def test_two_processes_have_losses_of_one(stage, precision, smoke, tmp_path):
    typed = ("train.py", *STAGES[stage], "training.steps=4")
    found, calibrated = [], []
    for ranks, trainer in ((1, "trainer=cpu"), (2, "trainer=ddp")):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        shutil.copytree(smoke.kept, folder / "cache")
        job = (*typed, trainer, "trainer.accelerator=cpu", f"trainer.precision='{precision}'")
        done = processes(*[job] * ranks, cwd=folder)
        assert not any(one.returncode for one in done), done
        assert "find_unused_parameters" not in done[0].stdout  # neither sought in vain nor missed
        found.append(rows(folder, 4))
        if stage != "diffusion":  # each of two processes looked at its share of the images
            (weights,) = [p for p in folder.rglob("weights.safetensors") if rows_of(p.parent) == 4]
            calibrated.append(atomic.read_tensors(weights))
    if stage != "diffusion":
        assert {"train/adversarial_weight", "train/discriminator", "train/kl_channel_min"} <= found[0][0].keys()
        one, two = calibrated
        assert one["calibrated_on"] == two["calibrated_on"] == 512
        for name in ("shift", "scale"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert_same(*found, LIMIT[precision])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["64", "32"])
@pytest.mark.parametrize("stage", STAGES)
def test_ddp_command_matches_one_process_for_20_steps(stage, precision, smoke, tmp_path):
    found = []
    for trainer in ("trainer=cpu", "trainer=ddp"):
        folder = tmp_path / trainer
        folder.mkdir()
        shutil.copytree(smoke.kept, folder / "cache")
        typed = (
            *STAGES[stage],
            "training.steps=20",
            trainer,
            "trainer.accelerator=cpu",
            f"trainer.precision={precision}",
        )
        done = process("train.py", *typed, cwd=folder, timeout=900)
        assert done.returncode == 0, done.stderr
        found.append(rows(folder, 20))
    assert_same(*found, LIMIT[precision])


@pytest.mark.slow
def test_ddp_run_samples_and_scores_like_one_process(smoke, tmp_path):
    """The whole of a run on two processes: both stages are trained and the numbers are those of one process."""
    typed = ("budget=smoke", "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32", "seed=0")
    done = process("train.py", *typed, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    import json

    (run,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n"] == 20
    assert run.name == smoke.run.name
    assert (run / "samples.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_ddp_best_checkpoint_equals_that_of_one_process(trainer, smoke, tmp_path):
    """At steps that only the best makes saving steps, on all ranks: none waits for another."""
    typed = (
        "train.py",
        *DIFFUSION,
        "training.steps=6",
        "training.save_every=100",
        "keep_best=-train/lr",
        "trainer.accelerator=cpu",
    )
    results = []
    for ranks, name in ((1, "cpu"), (2, trainer)):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        shutil.copytree(smoke.kept, folder / "cache")
        done = processes(*[(*typed, f"trainer={name}", "trainer.precision='32'")] * ranks, cwd=folder)
        assert not any(one.returncode for one in done), done
        (run,) = (folder / "runs").iterdir()
        results.append(
            (
                [path.name for path in list_checkpoints(run / "checkpoints")],
                (run / "checkpoints" / "best.json").read_text(),
            )
        )
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("training", ["evaluator", "classifier", "clip"])
def test_ddp_does_not_search_unused_parameters(training, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    none = (
        "~training.score",
        "~training.sample_every",
        "metrics=none",
        "training.steps=4",
        "training.batch_size=8",
        "training.save_every=4",
    )
    job = (
        "train.py",
        "budget=smoke",
        f"training={training}",
        *none,
        "training.seed=1" if training == "evaluator" else "seed=1",
        *CPU,
    )
    done = processes(*[job] * 2, cwd=tmp_path)
    assert not any(one.returncode for one in done), done
    assert "find_unused_parameters" not in done[0].stdout
