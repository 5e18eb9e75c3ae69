"""Override functions in sweeps: jobs announced, jobs run, folders and rows of the table are the same, and those of
Hydra alone.
"""

import random
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import ldm.config.search_path  # noqa: F401  makes experiments/ a group
from ldm.cli.sweep import SweepJob
from ldm.config.compose import Composition
from ldm.config.overrides import ConfigSearchPath
from ldm.errors import UserError

GRID = """
from pathlib import Path
from ldm.cli.main import run_command
from ldm.runs.status import JobStatus


def folder(cfg):
    return Path("runs") / " ".join(str(cfg[key]) for key in ("schedule", "debug", "seed", "lr", "order", "note"))


def main(cfg):
    folder(cfg).mkdir(parents=True, exist_ok=True)
    return cfg.lr


def ahead(cfg):
    return JobStatus({"lr": cfg.lr}, cfg.lr) if folder(cfg).is_dir() else JobStatus()


if __name__ == "__main__":
    run_command(main, "train", ahead=ahead)
"""
PLAIN = """
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(cfg):
    print("job:", *OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False))


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
    monkeypatch.setattr(SweepJob, "_run_subprocess", lambda self, cfg, devices: (0, {"result": self.task(cfg)}))


def typed(script: Path, *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
    return int(end.value.code or 0)


@dataclass(frozen=True)
class Sweep:
    """A sweep that ended: its jobs as they were announced, those skipped, the rows of its table with their states, and
    its run folders.
    """

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
    return Sweep(
        [job for _, job in jobs],
        [job for mark, job in jobs if mark],
        rows,
        last,
        sorted(path.name for path in Path("runs").iterdir()),
    )


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
    ("seed=shuffle(range(0,3))",),
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
    ("note=${schedule.kind},'\\${x}'",),
    ("order=[1,2],[3]",),
    ("order=sort([2,1,3])", "seed=0,1"),
    ("order=shuffle([1,2,3,4,5,6])",),
    ("note=shuffle('a, b',c d,'shuffle(x)',e\\,f)",),
]


QUICK = ("seed=shuffle(range(0,3))", "schedule=glob(lin*)")


@pytest.mark.parametrize("words", GRAMMAR, ids=" ".join)
def test_sweep_jobs_are_stable_when_recomposed(words, grid):
    plan = Composition(ConfigSearchPath((grid.parent / "conf",), grid.parent), "train", True, list(words))
    jobs = plan.job_overrides()
    assert len(jobs) == len(set(map(tuple, jobs))) > 0
    for _ in range(2):
        assert Composition(plan.tree, "train", True, plan.written).job_overrides() == jobs


@pytest.mark.parametrize(
    "words",
    [pytest.param(words, marks=[] if words[0] in QUICK else pytest.mark.slow, id=" ".join(words)) for words in GRAMMAR],
)
def test_sweep_runs_jobs_of_hydra(words, grid, in_process, capsys):
    """Jobs announced, jobs run, folders and rows are those of Hydra alone, also where all but one were done before."""
    out = lambda: capsys.readouterr().out  # noqa: E731
    random.seed(1)
    jobs = list_jobs(grid, out, *words)
    first = run_sweep(grid, out, *words)
    if "order=shuffle" in words[0]:  # one job, a list in another order each time
        assert len(jobs) == 1
        jobs = first.jobs
    assert (sorted(first.jobs) == sorted(jobs)) if "shuffle" in " ".join(words) else (first.jobs == jobs)
    assert first.rows == [(job, "done") for job in first.jobs]
    assert len(first.folders) == len(first.jobs) == len(jobs)
    assert first.last == f"{len(jobs)} of {len(jobs)} job{'s' * (len(jobs) > 1)} done"
    if "order=shuffle" in words[0]:
        return
    (Path("runs") / first.folders[-1]).rmdir()
    second = run_sweep(grid, out, *words)
    assert sorted(second.jobs) == sorted(first.jobs)
    assert len(second.skipped) == len(jobs) - 1
    assert second.rows == [(job, "skipped" if job in second.skipped else "done") for job in second.jobs]
    assert second.folders == first.folders


def test_sweep_shuffles_once(grid, in_process, capsys):
    sweep = run_sweep(grid, lambda: capsys.readouterr().out, "order=shuffle([1,2,3,4,5,6])")
    (order,) = re.findall(r"\[.*\]", "".join(sweep.folders))
    assert sweep.jobs == ["order=" + order.replace(" ", "")]


def test_sweep_glob_over_options_that_read_as_numbers(grid, in_process, capsys):
    sweep = run_sweep(grid, lambda: capsys.readouterr().out, "debug=glob(n*)")
    assert sweep.jobs == ["debug='nan'", "debug=none"]
    assert len(sweep.folders) == 2


STUDY = """
# @package _global_
hydra: {mode: MULTIRUN, sweeper: {params: {seed: "shuffle(range(4))", schedule: "glob(*,exclude=*2)"}}}
"""


def test_study_params_are_expanded_once(grid, in_process, capsys):
    study = grid.parent / "experiments" / "some" / "sweep.yaml"
    study.parent.mkdir(parents=True)
    study.write_text(STUDY)
    random.seed(1)
    sweep = run_sweep(grid, lambda: capsys.readouterr().out, "experiment=some", "seed=shuffle(0,1)")
    assert len(sweep.folders) == 4
    assert sorted(sweep.jobs) == [
        f"seed={seed} schedule={name} experiments=some/sweep" for seed in (0, 1) for name in ("cosine", "linear")
    ]
    assert sweep.rows == [(job, "done") for job in sweep.jobs]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("experiments=some/sweep",), "some"),
        (("experiments=some/sweep,other/sweep", "note=x"), "experiments,note"),
        (("experiments=some/sweep,other/sweep", "name=both"), "both"),
        (("name=a,b", "seed=0,1"), "name,seed"),
        (("name=a", "seed=0,1"), "a"),
    ],
)
def test_sweep_is_not_named_after_its_first_job(words, name, grid):
    """Its name is the group of all its runs at W&B."""
    for study in ("some", "other"):
        file = grid.parent / "experiments" / study / "sweep.yaml"
        file.parent.mkdir(parents=True)
        file.write_text("# @package _global_\nlr: 3.0")
    (grid.parent / "conf" / "train.yaml").write_text(CONFIG + "name: null\n")
    plan = Composition(ConfigSearchPath((grid.parent / "conf",), grid.parent), "train", True, list(words))
    plan.job_overrides()
    assert plan.sweep_name == name


def test_sweep_over_studies_matches_hydra(grid, in_process, capsys):
    """A study named beside another is one job: Hydra's sweeper takes no params of it, and none are announced."""
    for name in ("some", "other"):
        study = grid.parent / "experiments" / name / "sweep.yaml"
        study.parent.mkdir(parents=True)
        study.write_text(STUDY if name == "some" else "# @package _global_\nlr: 3.0")
    for number, value in enumerate(("some,other", "glob(*)")):
        sweep = run_sweep(grid, lambda: capsys.readouterr().out, f"experiment={value}", f"seed={number}")
        assert sorted(sweep.rows) == [(f"experiments={name}/sweep seed={number}", "done") for name in ("other", "some")]


INTERVAL = "an interval has no list of values, a search samples from it; add hydra/sweeper=optuna, or write values"
REFUSED = {
    "seed=interval(0,1)": INTERVAL,
    "schedule=interval(0,1)": INTERVAL,
    "schedule=glob(zz*)": "no option matches (one of cosine, linear, linear2)",
    "schedule=glob(*,exclude=*)": "no option matches (one of cosine, linear, linear2)",
    "seed=glob(*)": "glob() selects options of a group, and seed is not a group",
    "seed=range(3,3)": "a sweep over no value",
    "seed=range(0,3,0)": "range() arg 3 must not be zero",
    "lr=range(0,inf)": "a range needs finite numbers",
    "hydra.sweeper.max_batch_size=1,2": "Hydra's own settings are the same for every job of a sweep",
    "experiment=interval(0,1)": "does not list studies; write experiment=a,b",
}


@pytest.mark.parametrize("word", REFUSED)
def test_sweep_without_jobs_is_one_line_error(word, grid, capsys):
    assert typed(grid, "-m", word) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {word}{' ' if word.startswith('experiment') else ': '}{REFUSED[word]}"
    ]
    assert not Path("runs").exists()


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_sweep_with_unknown_option_is_one_line_error_for_every_launcher(launcher, grid, capsys):
    assert typed(grid, "-m", f"hydra/launcher={launcher}", "schedule=linear,linaer", "seed=0,1") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: schedule=linaer: no such option; did you mean 'linear'? (one of cosine, linear, linear2)"
    ]


def test_sweep_refuses_unannounced_job():
    job = SweepJob(print, Path("train.py"), names=("seed=0", "seed=1", "seed=0"))
    assert [job._number(number, name) for number, name in enumerate(job.names)] == [0, 1, 2]
    assert job._number(0, "seed=1") == 1
    with pytest.raises(RuntimeError, match="the job 'seed=2' is not one of the 3 jobs of the sweep"):
        job._number(2, "seed=2")


SEARCHED = {  # what a search draws from: the values that the grammar gives
    "seed=range(0,3)": {"0", "1", "2"},
    "seed=range(0,10,4)": {"0", "4", "8"},
    "seed=range(5,0,-2)": {"1", "3", "5"},
    "seed=sort(range(0,3),reverse=true)": {"0", "1", "2"},
    "seed=shuffle(range(0,3))": {"0", "1", "2"},
    "seed=tag(a,choice(1,2))": {"1", "2"},
    "seed=int(1.5,2.5)": {"1", "2"},
    "lr=range(0,1,0.5)": {"0.0", "0.5"},
    "schedule=glob(*,exclude=*2)": {"cosine", "linear"},
    "schedule=sort(linear,cosine)": {"cosine", "linear"},
    "note='a, b',c d": {"'a, b'", "'c d'"},
    "note=choice(a\\,b,c)": {"'a,b'", "c"},
}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["grid", "random"])
@pytest.mark.parametrize("word", SEARCHED)
def test_search_samples_values_of_sweep_functions(word, sampler, grid, in_process, capsys):
    key = word.partition("=")[0]
    trials = (
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.n_trials=9",
        *(("hydra.sweeper.sampler.seed=5",) if sampler == "random" else ()),
    )
    sweep = run_sweep(
        grid, lambda: capsys.readouterr().out, "hydra/sweeper=optuna", f"hydra/sweeper/sampler={sampler}", word, *trials
    )
    assert {job.removeprefix(f"{key}=") for job in sweep.jobs} == SEARCHED[word]
    assert len(sweep.jobs) == (len(SEARCHED[word]) if sampler == "grid" else 9)
    assert sweep.rows == [(job, "done") for job in sweep.jobs]
    assert len(sweep.folders) == len(SEARCHED[word])


@pytest.mark.parametrize("sweeper", ["basic", "optuna"])
def test_sweep_row_exists_for_job_that_never_started(sweeper, grid, monkeypatch, capsys):
    def refuse(self: SweepJob, cfg: object, devices: int) -> None:
        raise UserError("no room")

    monkeypatch.setattr(SweepJob, "_run_subprocess", refuse)
    search = ("hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=2") if sweeper == "optuna" else ()
    assert typed(grid, "-m", f"hydra/sweeper={sweeper}", "seed=0,1", *search) == 1
    out = capsys.readouterr().out
    assert len(re.findall(r"^  seed=[01]  failed \(1\) .* no room$", out, re.MULTILINE)) == 2
    assert "0 of 2 jobs done, 2 failed" in out


@pytest.mark.slow
def test_search_samples_intervals(grid, in_process, capsys):
    words = (
        "lr=tag(log,interval(1e-3,1e-1))",
        "seed=int(interval(1,4))",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.n_trials=5",
    )
    sweep = run_sweep(grid, lambda: capsys.readouterr().out, "hydra/sweeper=optuna", *words)
    values = [re.fullmatch(r"lr=(\S+) seed=([1-4])", job) for job in sweep.jobs]
    assert all(found and 1e-3 <= float(found[1]) <= 1e-1 for found in values)
    assert sweep.rows == [(job, "done") for job in sweep.jobs]


LAUNCHED = [  # every override function, in few sweeps of four jobs: each job is a process
    (
        *("seed=int(choice('3',2.5))", "order=[1,2],[3]", "schedule=glob(lin*,exclude=*2)"),
        *("lr=float(range(1,2))", "note=str(choice(a))"),
    ),
    ("seed=tag(a,shuffle(range(2)))", "note=${schedule.kind},'\\${x}'", "schedule=glob(*,exclude=lin*)"),
    ("lr=sort(range(0,1,0.5),reverse=true)", "note=shuffle('a, b',c d)", "seed=sort(shuffle(range(3,4)))"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local",)], ids=lambda words: words[0]
)
@pytest.mark.parametrize("words", LAUNCHED, ids=" ".join)
def test_launchers_run_jobs_of_hydra(words, launcher, grid, capfd):
    """Jobs, folders and rows are those of Hydra alone: all of them, then once more with one run missing."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown()  # joblib's workers of an earlier test, which work in its folder
    jobs = list_jobs(grid, lambda: capfd.readouterr().out, *words)
    command = (*words, f"hydra/launcher={launcher[0]}", *launcher[1:])
    for state in ("done", "skipped"):
        assert typed(grid, "-m", *command) == 0
        text = capfd.readouterr().out
        rows = re.findall(r"^  (\S.*?)  +(done|skipped|failed)\b", text, re.MULTILINE)
        assert sorted(job for job, _ in rows) == sorted(jobs)
        assert [state for _, state in sorted(rows, key=lambda row: row[1])] == ["done", *[state] * (len(jobs) - 1)]
        assert f"{len(jobs)} of {len(jobs)} jobs done" in text
        folders = sorted(Path("runs").iterdir())
        assert len(folders) == len(jobs) == 4
        folders[0].rmdir()
