"""Disks that are full, folders that are held or not ours, readers that are killed."""

import shutil
import socket
from functools import partial

import harm
import pytest
from smoke import command, here, process, processes

from ldm.checkpoint import step
from ldm.runs.folder import lock_run

DIFFUSION = (
    "train.py",
    "budget=smoke",
    "metrics=none",
    "training.steps=6",
    "training.save_every=2",
    "training.sample_every=100",
)


@pytest.mark.slow
def test_full_disk_is_reported_and_preserves_last_checkpoint(smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    (done,) = processes((*DIFFUSION, "trainer=cpu"), cwd=tmp_path, harm=partial(harm.full_disk, 4))
    assert done.returncode == 2, done.stdout
    assert "no space for a checkpoint" in done.stdout
    assert "MiB free in" in done.stdout
    (folder,) = tmp_path.glob("runs/*/checkpoints")
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert step.load_checkpoint(folder / "step-00000002").step == 2


def test_run_folder_in_use_is_refused(smoke, tmp_path, capfd):
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")), lock_run(tmp_path / "runs" / smoke.run.name):
        assert command("train.py", "budget=smoke") == 2
    assert "is in use by process" in capfd.readouterr().err


@pytest.mark.slow
def test_unwritable_folder_is_named(smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    (tmp_path / "runs").mkdir(mode=0o555)
    (done,) = processes((*DIFFUSION, "trainer=cpu"), cwd=tmp_path, harm=harm.powerless)
    assert done.returncode == 2, done.stdout
    assert "Permission denied: 'runs/" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.slow
def test_killed_data_worker_ends_run_in_one_line_and_resumes(smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    job = (*DIFFUSION, "trainer=cpu", "trainer.num_workers=2")
    (done,) = processes(job, cwd=tmp_path, harm=partial(harm.after_step, 3, harm.end_readers, (0,)))
    assert done.returncode == 2, done.stdout
    assert "a process that reads data is gone" in done.stdout
    assert "Traceback" not in done.stdout
    (done,) = processes(job, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "resuming from step 2 " in done.stdout


@pytest.mark.slow
def test_training_works_with_default_port_taken(smoke, tmp_path):
    """Of torch's own default port, by two processes as a person starts them."""
    shutil.copytree(smoke.kept, tmp_path / "cache")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("0.0.0.0", 29500))
        taken.listen()
        done = process(
            *DIFFUSION, "trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32", cwd=tmp_path, timeout=900
        )
    assert done.returncode == 0, done.stderr
