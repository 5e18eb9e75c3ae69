"""Sweeps: each job a world of its own, of the size it was given; a job that is killed, and the same sweep once more."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
from smoke import ROOT, command, here, process, processes

SCRIPT = """
import json, os
from pathlib import Path
from ldm.cli.main import run_command


def main(cfg):
    rank = os.environ.get("RANK", "0")
    told = {"world": os.environ.get("WORLD_SIZE", "1"), "rate": cfg.rate, "pid": os.getpid()}
    Path(f"{cfg.trainer.devices}-{cfg.rate}-{rank}.json").write_text(json.dumps(told))
    return cfg.rate


if __name__ == "__main__":
    run_command(main, "train")
"""


@pytest.fixture
def script(tmp_path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("{rate: 0.5, trainer: {devices: 1}}")
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path / "train.py"


@pytest.mark.slow
def test_sweep_job_is_a_world_with_agreeing_ranks(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(script), "-m", "trainer.devices=1,2,1", "rate=0.1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert {name: told["world"] for name, told in found.items()} == {"1-0.1-0": "1", "2-0.1-0": "2", "2-0.1-1": "2"}
    assert {told["rate"] for told in found.values()} == {0.1}
    assert len({told["pid"] for told in found.values()}) == 3
    assert "3 of 3 jobs done" in done.stdout


SWEEP = (
    "-m",
    "budget=smoke",
    "metrics=none",
    "training.steps=20",
    "training.save_every=2",
    "training.sample_every=100",
    "trainer=cpu",
)


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
def test_killed_sweep_job_fails_alone_and_resumes(smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LDM_CACHE": str(tmp_path / "cache"), "LDM_OFFLINE": "1"}
    line = [sys.executable, str(ROOT / "train.py"), *SWEEP, "seed=0,1"]
    with subprocess.Popen(
        line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as sweep:
        os.kill(held_by(tmp_path, 3, 500), signal.SIGKILL)
        said, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 1, said
    assert "job 1 failed: killed (SIGKILL)" in said, said
    assert "1 of 2 jobs done, 1 failed" in said
    again = process("train.py", *SWEEP, "seed=0,1", cwd=tmp_path, timeout=600)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count(", skipped: ") == 1
    assert again.stdout.count("resuming from step") == 1
    assert "2 of 2 jobs done" in again.stdout
    assert len(list(tmp_path.glob("runs/*/metrics.json"))) == 2


EIGHT = ("train.py", "-m", "budget=smoke", "metrics=none", "trainer=cpu", "seed=0,1,2,3,4,5,6,7")


def harm(failing: int | None, killed: int | None, rank: int) -> None:
    """The training with one seed raises; the kernel ends everything at the first step of that with another."""
    from ldm.training.diffusion import LitDiffusion

    step = LitDiffusion.training_step

    def training_step(self, batch, batch_idx):
        if self.seed == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == failing:
            raise RuntimeError("made to fail")
        return step(self, batch, batch_idx)

    LitDiffusion.training_step = training_step


def started(folder: Path, failing: int | None = None, killed: int | None = None) -> tuple[int, str, dict[str, int]]:
    """The sweep of eight once more: its exit code, what it said, and when each finished run was."""
    (sweep,) = processes(EIGHT, cwd=folder, harm=partial(harm, failing, killed))
    return (
        sweep.returncode,
        sweep.stdout,
        {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/metrics.json")},
    )


def numbers(said: str, how: str = "") -> list[int]:
    """The jobs that were begun, or skipped."""
    return [int(number) for number in re.findall(rf"^job (\d+) of 8{how}: ", said, re.MULTILINE)]


@pytest.mark.slow
def test_killed_sweep_finishes_exactly_missing_jobs(smoke, tmp_path):
    """First one fails and all are killed in the sixth; then one fails and the others are done; then that one is."""
    shutil.copytree(smoke.kept, tmp_path / "cache")
    code, said, first = started(tmp_path, failing=2, killed=5)
    assert code == -signal.SIGKILL
    assert numbers(said) == [1, 2, 3, 4, 5, 6]
    assert sorted(name[-2:] for name in first) == ["s0", "s1", "s3", "s4"]
    code, said, second = started(tmp_path, failing=2)
    assert code == 1
    assert (numbers(said), numbers(said, ", skipped")) == ([3, 6, 7, 8], [1, 2, 4, 5])
    assert len(second) == 7
    assert {name: second[name] for name in first} == first  # nobody touched them
    assert re.search(r"seed=2 +failed \(1\) .* RuntimeError: made to fail", said)
    assert "7 of 8 jobs done, 4 of them before, 1 failed" in said
    code, said, third = started(tmp_path)
    assert code == 0
    assert (numbers(said), numbers(said, ", skipped")) == ([3], [1, 2, 4, 5, 6, 7, 8])
    assert {name: third[name] for name in second} == second
    assert "8 of 8 jobs done, 7 of them before" in said


def losses(run: Path) -> list[dict[str, float]]:
    """What a run wrote of each step of its training."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if key.startswith("train/")} for row in rows if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local",)], ids=lambda words: words[0]
)
def test_launchers_finish_and_report_every_job(launcher, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    shutil.copytree(smoke.run, tmp_path / "runs" / smoke.run.name)
    jobs = ("budget=smoke", "seed=0,1,2", "training.optimizer.lr=2e-3", f"hydra/launcher={launcher[0]}", *launcher[1:])
    done = process("train.py", "-m", *jobs, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 jobs done, 1 of them before" in done.stdout
    found = {
        path.parent.name: json.loads(path.read_text())["fd_fashion"] for path in tmp_path.glob("runs/*/metrics.json")
    }
    assert sorted(name[-2:] for name in found) == ["s0", "s1", "s2"]
    for name, value in found.items():
        assert re.search(rf"seed={name[-1]} .*(done|skipped) +{re.escape(f'{value:.6g}')}", done.stdout), name
    plain = tmp_path / "plain"
    shutil.copytree(smoke.kept, plain / "cache")
    with here(plain):
        assert command("train.py", "budget=smoke", "seed=1", "training.optimizer.lr=2e-3") == 0
    (folder,) = (plain / "runs").iterdir()
    assert found[folder.name] == json.loads((folder / "metrics.json").read_text())["fd_fashion"]
    assert losses(tmp_path / "runs" / folder.name) == losses(folder) != []


@pytest.mark.slow
def test_search_uses_run_metrics_and_is_reproducible(smoke, tmp_path, capfd):
    search = (
        "hydra/sweeper=optuna",
        "training.optimizer.lr=interval(1e-4,1e-1)",
        "hydra.sweeper.n_trials=6",
        "hydra.sweeper.sampler.seed=1",
    )
    with here(tmp_path, LDM_CACHE=str(smoke.kept)):
        for times in (1, 2):
            assert command("train.py", "-m", "budget=smoke", "metrics=fd", *search, "hydra.sweeper.n_jobs=1") == 0
            said = capfd.readouterr().out
            found = [json.loads(path.read_text())["fd_fashion"] for path in tmp_path.glob("runs/*/metrics.json")]
            assert len(found) == 6
            assert said.count("this run is done") == (6 if times == 2 else 0)
            assert "6 of 6 jobs done" in said
            assert re.search(rf"best: training.optimizer.lr=\S+  {re.escape(f'{min(found):.6g}')}$", said, re.MULTILINE)
        assert (
            command(
                "train.py",
                "-m",
                "budget=smoke",
                "metrics=fd",
                "optimized_metric=nothing",
                *search,
                "hydra.sweeper.n_trials=1",
            )
            == 1
        )
    assert (
        "no number for the search to optimize: optimized_metric= must name a metric in the run's metrics.json"
        in capfd.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "code", "end"), [(5, 3, "step 5: .* are not finite"), (3, 0, "step 3: every module's .* are finite")]
)
def test_debug_step_reproduces_step_from_checkpoint(step, code, end, smoke, tmp_path):
    """The run skips its fifth step, whose loss is not a number; it is looked at again from the checkpoint before."""
    from harm import not_a_number

    shutil.copytree(smoke.kept, tmp_path / "cache")
    words = ("train.py", "budget=smoke", "metrics=none", "trainer=cpu", "training.steps=8")
    poison = partial(not_a_number, (5,), (0,))
    (first,) = processes((*words, "keep_last=9"), cwd=tmp_path, harm=poison)
    assert first.returncode == 0, first.stdout
    (run,) = (tmp_path / "runs").iterdir()
    (again,) = processes((*words, f"resume={run}", "debug=nan", f"debug.step={step}"), cwd=tmp_path, harm=poison)
    assert again.returncode == code, again.stdout
    assert f"resuming from step {step - 1} (" in again.stdout
    assert re.search(end, again.stdout)
