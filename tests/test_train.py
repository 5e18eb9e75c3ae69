"""train.py from the first command to the last: what it leaves, what it does when asked again, and that a seed is a
promise.
"""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from smoke import command, here, processes, train

from ldm.checkpoint.step import latest_valid_checkpoint
from ldm.io import atomic
from ldm.runs import metrics_log


def weights(path: Path) -> dict[str, torch.Tensor]:
    return atomic.read_tensors(path)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def place(smoke, tmp_path_factory):
    """A working directory for runs in this process, with the shared run's judge and first stage."""
    with here(tmp_path_factory.mktemp("train"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def again(place):
    """The shared run once more, in this process and in another place."""
    return train()


def test_run_folder_has_expected_files(smoke):
    run = smoke.run
    assert {"samples.png", "metrics.json", "metrics.jsonl", "config.yaml", "data.json", "weights.safetensors"} <= {
        p.name for p in run.iterdir()
    }
    assert [p.name for p in (run / "grids").iterdir()] == ["step-000002.png"]
    assert latest_valid_checkpoint(run / "checkpoints")[0].name == "step-00000002"
    for path in (run / "samples.png", run / "grids" / "step-000002.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert str(smoke.run.relative_to(smoke.folder)) in smoke.said
    assert "python sample.py run=" in smoke.said


def test_run_metrics_are_complete(smoke):
    metrics = smoke.metrics
    assert {
        "fd_fashion",
        "kid_fashion",
        "precision",
        "recall",
        "accuracy",
        "n",
        "guidance",
        "seconds",
    } <= metrics.keys()
    assert metrics["n"] == 20
    assert {
        "baseline/test/fd_fashion",
        "baseline/noisy/fd_fashion",
        "baseline/pca/fd_fashion",
        "first_stage/psnr",
    } <= metrics.keys()
    assert metrics["guidance"] in (1.0, 2.0)
    rows = metrics_log.read_metrics_log(smoke.run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["train/loss"] > 0 and row["train/lr"] > 0 for row in rows)


def test_run_records_provenance_and_choices(smoke):
    provenance = json.loads((smoke.run / "provenance.json").read_text())
    assert provenance["command"].endswith("train.py budget=smoke")
    assert provenance["packages"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    choices = json.loads((smoke.run / "choices.json").read_text())
    assert choices["data"] == "synthetic"
    assert choices["schedule"] == "cosine"


def test_finished_run_is_not_repeated(smoke, capfd):
    before = {p: p.stat().st_mtime_ns for p in smoke.run.rglob("*") if p.is_file()}
    with here(smoke.folder):
        assert command("train.py", "budget=smoke") == 0
    said = capfd.readouterr().out
    assert "this run is done" in said
    assert "fd_fashion" in said
    assert {p: p.stat().st_mtime_ns for p in smoke.run.rglob("*") if p.is_file()} == before


def test_same_seed_gives_same_weights_in_another_process(smoke, again):
    assert again.name == smoke.run.name
    for name in ("weights.safetensors", "first_stage.safetensors"):
        assert same(weights(again / name), weights(smoke.run / name)), name
    assert (again / "samples.png").read_bytes() == (smoke.run / "samples.png").read_bytes()


def test_other_seed_changes_weights_and_shares_first_stage(smoke, again, place):
    found = sorted(p.name for p in (smoke.folder / "cache" / "first_stage").iterdir())
    other = train("seed=1", "metrics=none")
    assert sorted(p.name for p in (smoke.folder / "cache" / "first_stage").iterdir()) == found
    assert same(weights(other / "first_stage.safetensors"), weights(again / "first_stage.safetensors"))
    a, b = weights(other / "weights.safetensors"), weights(again / "weights.safetensors")
    assert all(not torch.equal(a[name], b[name]) for name in a if name.endswith("weight") and a[name].ndim > 1)


def test_other_recipe_trains_another_first_stage(place, smoke, tmp_path, monkeypatch):
    cache = shutil.copytree(smoke.kept, tmp_path / "cache") / "first_stage"
    monkeypatch.setenv("LDM_CACHE", str(cache.parent))
    before = {p.name for p in cache.iterdir() if p.is_dir()}
    other = train("autoencoder.z_channels=3", "metrics=none")
    (made,) = {p.name for p in cache.iterdir() if p.is_dir()} - before
    assert (other / "first_stage.safetensors").read_bytes() == (cache / made / "weights.safetensors").read_bytes()
    assert len(weights(other / "first_stage.safetensors")["scale"]) == 3


@pytest.mark.slow
def test_changed_source_rebuilds_first_stage_only_on_request(place, smoke, tmp_path, monkeypatch, capfd):
    """The recipe's digest of the source is beside the weights: `trust` takes them, `rebuild` sets them aside and
    trains.
    """
    cache = shutil.copytree(smoke.kept, tmp_path / "cache")
    monkeypatch.setenv("LDM_CACHE", str(cache))
    whole = (smoke.run / "first_stage.safetensors").read_bytes()
    (folder,) = [p.parent for p in (cache / "first_stage").glob("*/weights.safetensors") if p.read_bytes() == whole]
    (folder / "source.txt").write_text("an older source")
    train("seed=2", "metrics=none")
    assert (folder / "source.txt").read_text() == "an older source"
    assert "autoencoder" not in capfd.readouterr().out
    train("seed=3", "metrics=none", "cache=rebuild")
    assert "autoencoder" in capfd.readouterr().out
    assert (folder / "source.txt").read_text() != "an older source"
    assert folder.with_name(f"{folder.name}-an older source").is_dir()


DIFFUSION = (
    "budget=smoke",
    "training.steps=6",
    "training.save_every=2",
    "training.sample_every=4",
    "metrics=none",
    "trainer=cpu",
)
AUTOENCODER = (
    *(
        "budget=smoke",
        "training=autoencoder",
        "training.steps=6",
        "training.save_every=2",
        "training.batch_size=8",
        "training.log_every=1",
    ),
    *("training.discriminator_start=0", "training.sample_every=4", "~training.score", "metrics=none", "trainer=cpu"),
)


@pytest.mark.parametrize("typed", [DIFFUSION, AUTOENCODER], ids=["diffusion", "autoencoder with its GAN"])
@pytest.mark.slow
def test_killed_run_resumes_to_same_weights(typed, smoke, tmp_path):
    """SIGKILL after step 5, the last checkpoint being step 4's: the second start takes that up and ends bit-equal to a
    run never killed.
    """
    ends = []
    for name, kills in (("whole", ()), ("killed", (5,))):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copytree(smoke.kept, folder / "cache")
        for step in kills:
            (killed,) = processes(("train.py", *typed), cwd=folder, kill_at=step)
            assert killed.returncode == -signal.SIGKILL, killed.stdout
        (done,) = processes(("train.py", *typed), cwd=folder)
        assert done.returncode == 0, done.stdout
        assert ("resuming from step 4" in done.stdout) == bool(kills)
        (journal,) = [
            p
            for p in folder.rglob("metrics.jsonl")
            if len({row["step"] for row in metrics_log.read_metrics_log(p)}) == 6
        ]
        ends.append((atomic.read_tensors(journal.parent / "weights.safetensors"), timeless(journal)))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)], ids=["terminated", "Ctrl-C"])
def test_stopped_run_has_no_result(number, code, smoke, tmp_path):
    """It says so by its exit code, by which a sweep ends too, keeps the step it was told at, and leaves no result."""
    shutil.copytree(smoke.kept, tmp_path / "cache")
    (stopped,) = processes(("train.py", *AUTOENCODER), cwd=tmp_path, kill_at=3, kill=number)
    assert stopped.returncode == code, stopped.stdout
    assert "Traceback" not in stopped.stdout
    assert latest_valid_checkpoint(next(tmp_path.rglob("checkpoints/step-00000003")).parent)[1] == []
    before = list(smoke.kept.rglob("metrics.json"))
    assert len(list(tmp_path.rglob("metrics.json"))) == len(before)
    assert len(list(tmp_path.rglob("weights.safetensors"))) == len(list(smoke.kept.rglob("weights.safetensors")))


def timeless(journal: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k != "wall" and not k.startswith("perf/")}
        for row in metrics_log.read_metrics_log(journal)
    ]


@pytest.mark.slow
def test_damaged_checkpoint_is_skipped_on_resume(smoke, tmp_path):
    """The newest step's file was cut short: the run goes on from the one before, and says which it skipped and why."""
    shutil.copytree(smoke.kept, tmp_path / "cache")
    assert processes(("train.py", *DIFFUSION), cwd=tmp_path, kill_at=5)[0].returncode == -signal.SIGKILL
    (step,) = tmp_path.glob("runs/*/checkpoints/step-00000004")
    (step / "model.safetensors").write_bytes((step / "model.safetensors").read_bytes()[:1000])
    (done,) = processes(("train.py", *DIFFUSION), cwd=tmp_path)
    assert done.returncode == 0
    assert "resuming from step 2" in done.stdout
    assert "skipping checkpoint" in done.stdout
    assert "1000 bytes" in done.stdout


@pytest.mark.slow
def test_first_stage_trained_alone_is_reused(place, smoke, capfd):
    """`training=autoencoder` keeps what it trains under its own options, and a run that names the same options finds
    it.
    """
    alone = (
        "~training.score",
        "training.steps=3",
        "training.discriminator_start=1",
        "training.sample_every=500",
        "metrics=none",
    )
    assert command("train.py", "budget=smoke", "training=autoencoder", *alone) == 0
    capfd.readouterr()
    run = train("first_stage.steps=3", "metrics=none")
    said = capfd.readouterr().out
    assert "writing to" in said
    assert "autoencoder" not in said
    assert not same(
        atomic.read_tensors(run / "first_stage.safetensors"), atomic.read_tensors(smoke.run / "first_stage.safetensors")
    )
