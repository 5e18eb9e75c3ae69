"""A sweep before it begins and after it ends: which jobs there are, what they share, what became of each."""

import re
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
from smoke import command, here

from ldm.cli.sweep import JobResult, failure_reason, format_forecast, print_results, train_dependencies
from ldm.errors import UserError
from ldm.runs.status import JobStatus

FIRST = Path("cache/first_stage/abc")


def asked(*said: str) -> tuple[dict[Path, object], list[str]]:
    """A need that notes when it is trained, and raises what is said."""
    calls: list[str] = []

    def train() -> None:
        calls.append("trained")
        if said:
            raise UserError(said[0])

    return {FIRST: train}, calls


def test_forecast_counts_jobs_and_hours():
    needs, calls = asked()
    known = [
        JobStatus({"fd": 2.5, "seconds": 3600}, 2.5),
        JobStatus(seconds=7200, missing_dependencies=needs),
        JobStatus(steps_done=1500, missing_dependencies=needs),
        JobStatus(seconds=3600),
    ]
    lines = format_forecast(["seed=0", "seed=1", "seed=2", "a seed=3"], known).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["seed=0", "done", "2.5", "60", "min"],
        ["seed=1", "to", "run", "about", "2.0", "h"],
        ["seed=2", "step", "1,500", "no", "similar", "run", "to", "go", "by"],
        ["a", "seed=3", "to", "run", "about", "60", "min"],
    ]
    assert lines[4:] == [
        "  first_stage abc is missing: trained first, for 2 jobs",
        "4 jobs, 1 done, 3 to run, about 4.5 hours one after another, judging by similar runs",  # 2 + 1 + their mean
    ]
    assert calls == []


def test_forecast_without_similar_run_has_no_estimate():
    assert format_forecast(["a"], [JobStatus()]).endswith(
        "1 job, 0 done, 1 to run, time unknown: no finished run is like them"
    )
    assert format_forecast(["a"], [JobStatus({}, None)]).endswith("1 job, 1 done, 0 to run")


def test_shared_dependencies_are_trained_once_and_first(capsys):
    needs, calls = asked()
    known = [
        JobStatus({"fd": 1.0}, 1.0, missing_dependencies=needs),
        JobStatus(missing_dependencies=needs),
        JobStatus(missing_dependencies=needs),
        JobStatus(),
    ]
    rows = train_dependencies("abcd", known)
    assert calls == ["trained"]
    assert rows == {0: JobResult(0, "a", "skipped", 1.0, reason="it was done before")}
    assert "first, for 2 jobs: first_stage abc" in capsys.readouterr().out
    assert train_dependencies("abcd", known, train=False) == rows
    assert calls == ["trained"]


def test_failed_dependency_stops_only_its_jobs(capsys):
    needs, _ = asked("no room")
    rows = train_dependencies(
        "abc", [JobStatus(missing_dependencies=needs), JobStatus(), JobStatus(missing_dependencies=needs)]
    )
    assert {number: (row.state, row.reason) for number, row in rows.items()} == dict.fromkeys(
        (0, 2), ("failed", "first_stage abc failed")
    )
    assert "first_stage abc failed: no room" in capsys.readouterr().err


ROWS = [
    JobResult(0, "seed=0", "skipped", 2.5, None, "it was done before"),
    JobResult(1, "seed=1", "failed (1)", None, 3.0, "ValueError: no"),
    JobResult(2, "seed=2", "done", 2.0, 4.0),
]


@pytest.mark.parametrize("terminal", [True, False])
def test_results_table_marks_failure_red(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert print_results(ROWS) == 1
    skipped, failed, done, last = capsys.readouterr().out.strip("\n").splitlines()
    assert failed.startswith("\x1b[31m") == failed.endswith("\x1b[0m") == terminal
    assert re.sub("\x1b\\[[0-9]*m", "", failed).split() == ["seed=1", "failed", "(1)", "3.0", "s", "ValueError:", "no"]
    assert skipped.split() == ["seed=0", "skipped", "2.5", "it", "was", "done", "before"]
    assert done.split() == ["seed=2", "done", "2", "4.0", "s"]
    assert last == "2 of 3 jobs done, 1 of them before, 1 failed"


def test_results_without_failure_exit_0(capsys):
    assert print_results([ROWS[0], ROWS[2]]) == 0
    assert capsys.readouterr().out.endswith("\n2 of 2 jobs done, 1 of them before\n")


def test_failure_reason_from_exit_code_or_error():
    assert failure_reason(137, {}) == "killed (SIGKILL)"
    assert failure_reason(1, {"error": "no room"}) == "no room"
    assert failure_reason(7, {}) == "exit code 7"


SCRIPT = """
from pathlib import Path
from ldm.cli.main import run_command
from ldm.errors import UserError
from ldm.runs.status import JobStatus


def main(cfg):
    Path(f"{cfg.seed}.ran").touch()
    if cfg.seed == 3:
        raise UserError("mend this")
    return cfg.seed


def shared():
    Path("shared.ran").touch()


def ahead(cfg):
    if cfg.seed == 1:
        return JobStatus({"fd": 7.0}, 7.0)
    return JobStatus(missing_dependencies={Path("cache/first_stage/abc"): shared}, seconds=36 * cfg.seed)


if __name__ == "__main__":
    run_command(main, "train", ahead=ahead)
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("{seed: 0, dry_run: false, trainer: {devices: 1}}")
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "train.py"


def typed(script: Path, *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
    return int(end.value.code or 0)


def test_sweep_skips_done_jobs_and_continues_after_failure(script, capfd):
    assert typed(script, "-m", "seed=1,2,3", "dry_run=true") == 0
    said = capfd.readouterr().out
    assert "3 jobs, 1 done, 2 to run, about 0.05 hours" in said
    assert "seed=2" in said
    assert "dry_run=true" not in said
    assert not list(Path.cwd().glob("*.ran"))
    assert typed(script, "-m", "seed=1,2,3") == 1
    assert sorted(path.name for path in Path.cwd().glob("*.ran")) == ["2.ran", "3.ran", "shared.ran"]
    said = capfd.readouterr()
    assert "2 of 3 jobs done, 1 of them before, 1 failed" in said.out
    assert re.search(r"seed=3 +failed \(2\) .*mend this", said.out)
    assert said.err.splitlines() == ["error: mend this", "job 3 failed: mend this"]


def test_dry_run_of_one_job_prints_forecast(script, capfd):
    assert typed(script, "seed=2", "dry_run=true") == 0
    assert "1 job, 0 done, 1 to run, about 0.02 hours" in capfd.readouterr().out


def test_dry_run_of_search_prints_no_forecast(script, capfd):
    assert typed(script, "-m", "hydra/sweeper=optuna", "seed=range(1,9)", "dry_run=true") == 0
    assert capfd.readouterr().out == "the sweeper chooses its jobs as it goes: there is nothing to list\n"


def test_missing_launcher_plugin_names_extra(script, capfd):
    assert typed(script, "-m", "hydra/launcher=ray", "seed=1,2") == 2
    assert "pip install -e '.[sweep]' installs joblib" in capfd.readouterr().err


@pytest.mark.slow
def test_dry_run_reads_status_from_run_folders(smoke, capfd):
    with here(smoke.folder, LDM_CACHE=str(smoke.kept)):
        assert command("train.py", "-m", "budget=smoke", "seed=0,1", "autoencoder.z_channels=8,3", "dry_run=true") == 0
    lines = capfd.readouterr().out.splitlines()
    states = [re.split("  +", line.strip()) for line in lines[:4]]
    assert [state[1] for state in states] == ["done", "to run", "to run", "to run"]
    assert [state[2][:5] for state in states[1:]] == [
        "no si",
        "about",
        "no si",
    ]  # another first stage is another training
    assert re.fullmatch(r"  first_stage \w+ is missing: trained first, for 2 jobs", lines[4])
    assert lines[5].startswith("4 jobs, 1 done, 3 to run, about ")
