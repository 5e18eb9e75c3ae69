"""A sweep before it begins and after it ends: which jobs there are, what they share, what became of each."""

import random
import re
import runpy
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from smoke import command, here

from ldm.errors import UserError
from ldm.sweep import Job, Known, Row, forecast, prepared, report, why

FIRST = Path("cache/first_stage/abc")


def asked(*said: str) -> tuple[dict[Path, object], list[str]]:
    """A need that notes when it is trained, and raises what is said."""
    calls: list[str] = []

    def train() -> None:
        calls.append("trained")
        if said:
            raise UserError(said[0])

    return {FIRST: train}, calls


def test_the_forecast_counts_jobs_and_hours():
    needs, calls = asked()
    known = [
        Known({"fd": 2.5, "seconds": 3600}, 2.5),
        Known(seconds=7200, needs=needs),
        Known(begun=1500, needs=needs),
        Known(seconds=3600),
    ]
    lines = forecast(["seed=0", "seed=1", "seed=2", "a seed=3"], known).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["seed=0", "done", "2.5", "60", "min"],
        ["seed=1", "to", "run", "about", "2.0", "h"],
        ["seed=2", "step", "1,500", "no", "run", "like", "it"],
        ["a", "seed=3", "to", "run", "about", "60", "min"],
    ]
    assert lines[4:] == [
        "  first_stage abc is not there: trained first, for 2 jobs",
        "4 jobs, 1 done, 3 to run, about 4.5 hours one after another, as like runs took",  # 2 + 1 + their mean
    ]
    assert calls == []


def test_where_there_is_nothing_to_go_by_it_says_so():
    assert forecast(["a"], [Known()]).endswith("1 job, 0 done, 1 to run, for how long nobody knows: no finished run is like them")
    assert forecast(["a"], [Known({}, None)]).endswith("1 job, 1 done, 0 to run")


def test_what_jobs_share_is_trained_once_and_before_them(capsys):
    needs, calls = asked()
    known = [Known({"fd": 1.0}, 1.0, needs=needs), Known(needs=needs), Known(needs=needs), Known()]
    rows = prepared("abcd", known)
    assert calls == ["trained"]
    assert rows == {0: Row(0, "a", "skipped", 1.0, reason="it was done before")}
    assert "first, for 2 jobs: first_stage abc" in capsys.readouterr().out
    assert prepared("abcd", known, train=False) == rows
    assert calls == ["trained"]


def test_a_first_stage_that_fails_stops_its_own_jobs_alone(capsys):
    needs, _ = asked("no room")
    rows = prepared("abc", [Known(needs=needs), Known(), Known(needs=needs)])
    assert {number: (row.state, row.reason) for number, row in rows.items()} == dict.fromkeys((0, 2), ("failed", "first_stage abc failed"))
    assert "first_stage abc failed: no room" in capsys.readouterr().err


ROWS = [
    Row(0, "seed=0", "skipped", 2.5, None, "it was done before"),
    Row(1, "seed=1", "failed (1)", None, 3.0, "ValueError: no"),
    Row(2, "seed=2", "done", 2.0, 4.0),
]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_last_table_has_a_red_row_for_a_failure(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert report(ROWS) == 1
    skipped, failed, done, last = capsys.readouterr().out.strip("\n").splitlines()
    assert failed.startswith("\x1b[31m") == failed.endswith("\x1b[0m") == terminal
    assert re.sub("\x1b\\[[0-9]*m", "", failed).split() == ["seed=1", "failed", "(1)", "3.0", "s", "ValueError:", "no"]
    assert skipped.split() == ["seed=0", "skipped", "2.5", "it", "was", "done", "before"]
    assert done.split() == ["seed=2", "done", "2", "4.0", "s"]
    assert last == "2 of 3 jobs done, 1 of them before, 1 failed"


def test_nothing_failed_is_success(capsys):
    assert report([ROWS[0], ROWS[2]]) == 0
    assert capsys.readouterr().out.endswith("\n2 of 2 jobs done, 1 of them before\n")


def test_why_a_job_failed():
    assert why(137, {}) == "killed (SIGKILL)"
    assert why(1, {"error": "no room"}) == "no room"
    assert why(7, {}) == "exit code 7"


SCRIPT = """
from pathlib import Path
from ldm.command import command
from ldm.errors import UserError
from ldm.sweep import Known


def main(cfg):
    Path(f"{cfg.seed}.ran").touch()
    if cfg.seed == 3:
        raise UserError("mend this")
    return cfg.seed


def shared():
    Path("shared.ran").touch()


def ahead(cfg):
    if cfg.seed == 1:
        return Known({"fd": 7.0}, 7.0)
    return Known(needs={Path("cache/first_stage/abc"): shared}, seconds=36 * cfg.seed)


if __name__ == "__main__":
    command(main, "train", ahead=ahead)
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("{seed: 0, dry: false, trainer: {devices: 1}}")
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "train.py"


def typed(script: Path, *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
    return int(end.value.code or 0)


def test_a_sweep_skips_what_is_done_and_goes_on_after_a_failure(script, capfd):
    assert typed(script, "-m", "seed=1,2,3", "dry=true") == 0
    said = capfd.readouterr().out
    assert "3 jobs, 1 done, 2 to run, about 0.05 hours" in said
    assert "seed=2" in said
    assert "dry=true" not in said
    assert not list(Path.cwd().glob("*.ran"))
    assert typed(script, "-m", "seed=1,2,3") == 1
    assert sorted(path.name for path in Path.cwd().glob("*.ran")) == ["2.ran", "3.ran", "shared.ran"]
    said = capfd.readouterr()
    assert "2 of 3 jobs done, 1 of them before, 1 failed" in said.out
    assert re.search(r"seed=3 +failed \(2\) .*mend this", said.out)
    assert said.err.splitlines() == ["error: mend this", "job 3 failed: mend this"]


def test_one_job_is_a_forecast_too(script, capfd):
    assert typed(script, "seed=2", "dry=true") == 0
    assert "1 job, 0 done, 1 to run, about 0.02 hours" in capfd.readouterr().out


def test_a_search_has_no_forecast(script, capfd):
    assert typed(script, "-m", "hydra/sweeper=optuna", "seed=range(1,9)", "dry=true") == 0
    assert capfd.readouterr().out == "a search chooses its jobs as it goes\n"


def test_a_plugin_that_is_not_there(script, capfd):
    assert typed(script, "-m", "hydra/launcher=ray", "seed=1,2") == 2
    assert "pip install -e '.[sweep]' brings joblib" in capfd.readouterr().err


GRID = """
from pathlib import Path
from ldm.command import command
from ldm.sweep import Known


def folder(cfg):
    return Path("runs") / " ".join(str(cfg[key]) for key in ("schedule", "debug", "seed", "lr", "order", "note"))


def main(cfg):
    folder(cfg).mkdir(parents=True)
    return cfg.lr


def ahead(cfg):
    return Known({"lr": cfg.lr}, cfg.lr) if folder(cfg).is_dir() else Known()


if __name__ == "__main__":
    command(main, "train", ahead=ahead)
"""
PLAIN = """
import hydra
from hydra.core.hydra_config import HydraConfig


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg):
    print("job:", *HydraConfig.get().overrides.task)


main()
"""
CONFIG = """
defaults: [_self_, {schedule: linear}, {debug: none}, {experiments: null}]
seed: 0
lr: 1.5
order: [0]
note: ""
dry: false
trainer: {devices: 1}
"""


@pytest.fixture
def grid(tmp_path, monkeypatch) -> Path:
    """A command whose jobs leave a folder each, and Hydra alone with the same config (plain.py)."""
    for name in ("schedule/linear", "schedule/linear2", "schedule/cosine", "debug/none", "debug/nan"):
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"kind: {file.stem}")
    (tmp_path / "conf" / "train.yaml").write_text(CONFIG)
    (tmp_path / "train.py").write_text(GRID)
    (tmp_path / "plain.py").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "train.py"


@pytest.fixture
def in_process(monkeypatch) -> None:
    """Jobs are run by the process that sweeps."""
    monkeypatch.setattr(Job, "_process", lambda self, cfg, devices: (0, {"result": self.task(cfg)}))


@dataclass(frozen=True)
class Sweep:
    """A sweep that ended: its jobs as they were announced, those skipped, the rows of its table with their states, and its run folders."""

    jobs: list[str]
    skipped: list[str]
    rows: list[tuple[str, str]]
    last: str
    folders: list[str]


def run_sweep(script: Path, out: Callable[[], str], *words: str) -> Sweep:
    assert typed(script, "-m", *words) == 0
    text = out()
    jobs = re.findall(r"^job \d+(?: of \d+)?(, skipped)?: (.*)$", text, re.MULTILINE)
    rows = re.findall(r"^  (\S.*?)  +(done|skipped|failed)\b.*$", text, re.MULTILINE)
    last = next(line for line in reversed(text.splitlines()) if " done" in line)
    return Sweep([job for _, job in jobs], [job for mark, job in jobs if mark], rows, last, sorted(path.name for path in Path("runs").iterdir()))


def list_jobs(script: Path, out: Callable[[], str], *words: str) -> list[str]:
    """The jobs that Hydra alone runs."""
    with pytest.MonkeyPatch.context() as patch:
        quiet = ("hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.sweep.dir=plain")
        patch.setattr(sys, "argv", ["plain.py", "-m", *words, *quiet])
        runpy.run_path(str(script.with_name("plain.py")), run_name="__main__")
    return re.findall(r"^job: (.*)$", out(), re.MULTILINE)


GRAMMAR = [
    ("seed=3,1,2",),
    ("seed=choice(3,1,2)",),
    ("schedule=choice(linear,cosine)", "seed=0,1"),
    ("seed=range(3)",),
    ("seed=range(5,0,-2)",),
    ("lr=range(0,1,0.25)",),
    ("seed=sort(3,1,2)",),
    ("seed=sort(choice(2,3,1),reverse=true)",),
    ("seed=sort(range(10,100,20),reverse=true)",),
    ("seed=shuffle(range(0,4))",),
    ("seed=shuffle(1,2,3)",),
    ("seed=shuffle(choice(1,2,3))", "lr=1,2"),
    ("seed=shuffle(sort(range(3,0,-1)))",),
    ("seed=sort(shuffle(range(0,3)))",),
    ("seed=tag(a,b,choice(1,2))",),
    ("seed=tag(a,shuffle(range(3)))",),
    ("seed=int(1.2,2.7)",),
    ("seed=int(choice('3',2.5))",),
    ("seed=int(range(0.5,3.5))",),
    ("lr=float(range(1,4))",),
    ("note=str(choice(a,b))",),
    ("schedule=glob(lin*)",),
    ("schedule=glob(*,exclude=cos*)", "seed=shuffle(range(2))"),
    ("schedule=glob([lin*,cos*],exclude=[*2])",),
    ("order=[1,2],[3]",),
    ("order=sort([2,1,3])", "seed=0,1"),
    ("order=shuffle([1,2,3,4,5,6])",),
    ("note=shuffle('a, b',c d,'shuffle(x)',null,{a: 1},e\\,f)",),
]


@pytest.mark.parametrize("words", GRAMMAR, ids=" ".join)
def test_sweep_runs_the_jobs_of_hydra(words, grid, in_process, capsys):
    """Every override function: jobs announced, jobs run, folders and rows are those of Hydra alone, also where all but one was done before."""
    out = lambda: capsys.readouterr().out  # noqa: E731
    random.seed(1)
    jobs = list_jobs(grid, out, *words)
    shuffled = any("shuffle" in word for word in words)
    first = run_sweep(grid, out, *words)
    if shuffled and "order" not in words[0]:
        assert sorted(first.jobs) == sorted(jobs)
    elif not shuffled:
        assert first.jobs == jobs
    assert first.rows == [(job, "done") for job in first.jobs]
    assert len(first.folders) == len(first.jobs) == len(jobs)
    assert first.last == f"{len(jobs)} of {len(jobs)} job{'s' * (len(jobs) > 1)} done"
    if "order=shuffle" in words[0]:  # another list each time, one job
        return
    (Path("runs") / first.folders[-1]).rmdir()
    second = run_sweep(grid, out, *words)
    assert sorted(second.jobs) == sorted(first.jobs)
    assert len(second.skipped) == len(jobs) - 1
    assert second.rows == [(job, "skipped" if job in second.skipped else "done") for job in second.jobs]
    assert second.folders == first.folders


def test_announced_job_has_the_config_that_is_run(grid, in_process, capsys):
    """A shuffled list is one value: the config that was checked, and known to be done, is the one that runs."""
    for seed in range(4):
        random.seed(seed)
        sweep = run_sweep(grid, lambda: capsys.readouterr().out, "order=shuffle([1,2,3,4,5,6])", f"seed={seed}")
        (order,) = re.findall(r"order=(\S+)", sweep.jobs[0])
        assert any(folder.replace(" ", "").startswith("") and order.replace(",", ", ") in folder for folder in sweep.folders)


def test_glob_over_options_that_read_as_numbers(grid, in_process, capsys):
    sweep = run_sweep(grid, lambda: capsys.readouterr().out, "debug=glob(n*)")
    assert sweep.jobs == ["debug='nan'", "debug=none"]
    assert len(sweep.folders) == 2


@pytest.mark.slow
def test_a_training_is_known_by_its_folder_and_by_runs_like_it(smoke, capfd):
    with here(smoke.folder, LDM_CACHE=str(smoke.kept)):
        assert command("train.py", "-m", "budget=smoke", "seed=0,1", "autoencoder.z_channels=8,3", "dry=true") == 0
    lines = capfd.readouterr().out.splitlines()
    states = [re.split("  +", line.strip()) for line in lines[:4]]
    assert [state[1] for state in states] == ["done", "to run", "to run", "to run"]
    assert [state[2][:5] for state in states[1:]] == ["no ru", "about", "no ru"]  # another first stage is another training
    assert re.fullmatch(r"  first_stage \w+ is not there: trained first, for 2 jobs", lines[4])
    assert lines[5].startswith("4 jobs, 1 done, 3 to run, about ")
