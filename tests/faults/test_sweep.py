"""Sweeps: each job a world of its own, of the size it was given; a job that is killed, and the same sweep once more."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from smoke import ROOT, process

SCRIPT = """
import json, os
from pathlib import Path
from ldm.command import command


def main(cfg):
    rank = os.environ.get("RANK", "0")
    told = {"world": os.environ.get("WORLD_SIZE", "1"), "rate": cfg.rate, "pid": os.getpid()}
    Path(f"{cfg.trainer.devices}-{cfg.rate}-{rank}.json").write_text(json.dumps(told))
    return cfg.rate


if __name__ == "__main__":
    command(main, "train")
"""


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("{rate: 0.5, trainer: {devices: 1}}")
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path / "train.py"


@pytest.mark.slow
def test_each_job_is_a_world_of_its_own_whose_ranks_agree(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script), "-m", "trainer.devices=1,2,1", "rate=0.1"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: told["world"] for name, told in found.items()} == {"1-0.1-0": "1", "2-0.1-0": "2", "2-0.1-1": "2"}
    assert {told["rate"] for told in found.values()} == {0.1}
    assert len({told["pid"] for told in found.values()}) == 3
    assert "3 of 3 jobs done" in done.stdout


SWEEP = ("-m", "budget=smoke", "metrics=none", "training.steps=20", "training.save_every=2", "training.grid_every=100", "trainer=cpu")


def held_by(folder: Path, rows: int, seconds: float) -> int:
    """The process that trains in the first run folder that comes to have so many rows."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for journal in folder.glob("runs/*/metrics.jsonl"):
            if len(journal.read_bytes().splitlines()) > rows and (journal.parent / ".lock.pid").is_file():
                return int((journal.parent / ".lock.pid").read_text())
        time.sleep(0.02)
    raise AssertionError("no job came so far")


@pytest.mark.slow
def test_a_killed_job_fails_alone_and_the_same_sweep_goes_on_with_it(smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LDM_CACHE": str(tmp_path / "cache"), "LDM_OFFLINE": "1"}
    line = [sys.executable, str(ROOT / "train.py"), *SWEEP, "seed=0,1"]
    with subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        os.kill(held_by(tmp_path, 3, 500), signal.SIGKILL)
        said, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 1, said
    assert "job 1 failed with exit code 137" in said
    assert "1 of 2 jobs done, 1 failed" in said
    again = process("train.py", *SWEEP, "seed=0,1", cwd=tmp_path, timeout=600)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("this run is done") == 1
    assert again.stdout.count("resuming from step") == 1
    assert "2 of 2 jobs done" in again.stdout
    assert len(list(tmp_path.glob("runs/*/metrics.json"))) == 2
