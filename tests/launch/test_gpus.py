"""GPUs shared out among jobs, on a machine whose nvidia-smi is made up."""

import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.launch import gpus

LISTED = "0, GPU-aa, 3\n1, GPU-bb, 20000\n2, GPU-cc, 0\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Where nvidia-smi says what it is told to."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def has(listed: str) -> None:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\nprintf '%s' '{listed}'\n")
        smi.chmod(0o755)

    return has


def test_idle_gpus_excludes_used_and_invisible(machine, monkeypatch):
    machine(LISTED)
    assert gpus.idle_gpus() == ("GPU-aa", "GPU-cc")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    assert gpus.idle_gpus() == ("GPU-cc",)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa")
    assert gpus.idle_gpus() == ("GPU-aa",)


def test_idle_gpus_reports_none(machine, monkeypatch, tmp_path):
    machine("0, GPU-aa, 70000\n")
    with pytest.raises(UserError, match="all 1 GPUs of this machine are in use; wait, or hydra/launcher=joblib"):
        gpus.idle_gpus()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(UserError, match="nvidia-smi finds no GPU on this machine"):
        gpus.idle_gpus()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="nvidia-smi finds no GPU on this machine"):
        gpus.idle_gpus()


def test_acquire_gpus_is_exclusive(machine):
    with gpus.acquire_gpus(("a", "b")) as first, gpus.acquire_gpus(("a", "b")) as second:
        assert (first, second) == ({"CUDA_VISIBLE_DEVICES": "a"}, {"CUDA_VISIBLE_DEVICES": "b"})
        third: list[dict[str, str]] = []

        def wait() -> None:
            with gpus.acquire_gpus(("a", "b"), 2, every=0.01) as pinned:
                third.append(pinned)

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.2)
        assert not third
    waiting.join(600)
    assert third == [{"CUDA_VISIBLE_DEVICES": "a,b"}]
    assert not waiting.is_alive()


def test_acquire_gpus_rejects_more_than_available(machine):
    with gpus.acquire_gpus(()) as pinned:
        assert pinned == {}
    with (
        pytest.raises(UserError, match=r"trainer.devices=3: hydra/launcher=gpus has 2 idle GPUs on this machine"),
        gpus.acquire_gpus(("a", "b"), 3),
    ):
        pass


SCRIPT = """
import os, time
from pathlib import Path
from ldm.cli.main import run_command


def main(cfg):
    start = time.time()
    time.sleep(0.5)
    Path(f"{cfg.seed}.held").write_text(f"{os.environ['CUDA_VISIBLE_DEVICES']} {start} {time.time()}")


if __name__ == "__main__":
    run_command(main, "train")
"""


@pytest.mark.slow
def test_gpu_launcher_runs_one_job_per_gpu(machine, tmp_path):
    import shutil
    import subprocess
    import sys

    from smoke import ROOT

    machine(LISTED)
    shutil.copytree(ROOT / "conf" / "hydra", tmp_path / "conf" / "hydra")
    (tmp_path / "conf" / "train.yaml").write_text("{seed: 0, trainer: {devices: 1}}")
    (tmp_path / "train.py").write_text(SCRIPT)
    line = [sys.executable, "train.py", "-m", "seed=0,1,2,3", "hydra/launcher=gpus"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 jobs done" in done.stdout
    held = [Path(file).read_text().split() for file in tmp_path.glob("*.held")]
    assert {gpu for gpu, _, _ in held} == {"GPU-aa", "GPU-cc"}
    for gpu in ("GPU-aa", "GPU-cc"):
        spans = sorted((float(start), float(end)) for name, start, end in held if name == gpu)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))
