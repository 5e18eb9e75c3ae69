"""Reports: rows matched by content, intervals, protocols never mixed, README tables equal the csv, comparisons."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from smoke import ROOT

from ldm.cli.errors import run_guarded
from ldm.config import compose as compose_module
from ldm.config import serialize
from ldm.config.compose import ComposedJob, compose_jobs
from ldm.errors import UserError
from ldm.evaluation import protocol
from ldm.report import __main__, browse, collect, figure, rows, study, table
from ldm.report.compare import format_comparison, sparkline
from ldm.runs import metrics_log

SWEEP = """# @package _global_
defaults:
  - override /prediction: v
hydra: {mode: MULTIRUN, sweeper: {params: {schedule: "linear,cosine", seed: "0,1"}}}
"""
STUDY = """
title: A toy
question: is cosine better?
paper: "A paper, tab. 1"
setting: nothing at all
axes: [schedule]
metrics: {fd_fashion: FID, accuracy: null}
baseline: {schedule: linear}
published: [{schedule: linear, FID: 3.0}, {schedule: cosine, FID: 2.0}, {schedule: sigmoid, FID: 2.5}]
scale: reduced
"""
SAID = protocol.with_protocol_hash({"network": "toy", "n": 100, "sampler": "ddim(eta=0)"})


COMPOSED: dict = {}


def once(script: str, typed: list, config_dir: object = None, compose: object = compose_jobs) -> list:
    """jobs.composed, which takes its time, once for all tests: the toy is the same in each."""
    if tuple(typed) not in COMPOSED:
        COMPOSED[tuple(typed)] = compose(script, typed)
    return COMPOSED[tuple(typed)]


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A repository with one study, and its folder."""
    folder = tmp_path / "experiments" / "toy"
    folder.mkdir(parents=True)
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "study.yaml").write_text(STUDY)
    (tmp_path / "experiments" / "README.md").write_text("# Toy\n\n<!-- studies -->\n<!-- /studies -->\n")
    monkeypatch.setattr(compose_module, "ROOT", tmp_path)
    monkeypatch.setattr(compose_module, "compose_jobs", once)
    monkeypatch.setattr(__main__, "STUDIES", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    return folder


def ran(job: ComposedJob, prefix: str = "fashion_mnist-", **metrics: object) -> Path:
    """A finished run folder of a job, with numbers of its own."""
    folder = Path(job.config["runs"]) / f"{prefix}{collect.job_id(job)}"
    folder.mkdir(parents=True)
    serialize.save_config(job.config, folder / "config.yaml")
    (folder / "provenance.json").write_text(json.dumps({"commit": "0123456789abcdef", "changed": True}))
    metrics_log.write_final_metrics(folder, {"n": 100, "seconds": 9.0, **SAID, **metrics})
    return folder


def row(schedule: str, seed: int, fd: float, **more: object) -> dict:
    return {"schedule": schedule, "seed": seed, "fd_fashion": fd, **SAID, **more}


def test_rows_round_trip(tmp_path):
    rows.write(tmp_path / "a.csv", [{"a": 1.23456789, "b": [0.0, 1.0]}, {"c": None, "a": "x, y", "b": True}])
    assert rows.read(tmp_path / "a.csv") == [
        {"a": "1.23457", "b": "[0,1]", "c": ""},
        {"a": "x, y", "b": "true", "c": ""},
    ]
    assert [rows.parse_number(cell) for cell in ("1e-3", "", "x", None)] == [0.001, None, None, None]
    rows.append(tmp_path / "a.csv", {"d": 1})
    assert [one["d"] for one in rows.read(tmp_path / "a.csv")] == ["", "", "1"]
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match=r"a\.csv, line 3: not as many cells"):
        rows.read(tmp_path / "a.csv")


def test_comparisons_are_paired_with_t_interval(toy):
    one = study.read(toy)
    found = [row("linear", 0, 10.0), row("linear", 1, 20.0), row("linear", 2, 30.0), row("linear", 3, 99.0)]
    found += [row("cosine", 0, 9.0), row("cosine", 1, 18.0), row("cosine", 2, 27.0)]
    by_arm = {line.arm[0]: line for line in table.comparisons(one, found) if line.metric == "fd_fashion"}
    cosine, linear, sigmoid = by_arm["cosine"], by_arm["linear"], by_arm["sigmoid"]
    assert (cosine.ours, cosine.seeds, cosine.difference, cosine.published, cosine.theirs) == (18.0, 3, -2.0, 2.0, -1.0)
    assert cosine.interval == pytest.approx(
        (-2 - 2.4842, -2 + 2.4842), abs=1e-3
    )  # t = 4.3027, deviation 1, three seeds
    assert cosine.verdict == "not told apart"
    assert (linear.difference, linear.interval, linear.verdict) == (None, None, table.NONE)
    assert (sigmoid.ours, sigmoid.seeds, sigmoid.theirs) == (None, 0, -0.5)
    close = [*found[:3], *(row("cosine", seed, 10.0 * (seed + 1) - 2 - seed / 10) for seed in range(3))]
    (sure,) = [
        line for line in table.comparisons(one, close) if line.arm == ("cosine",) and line.metric == "fd_fashion"
    ]
    assert sure.verdict == "yes"
    (turned,) = [
        line
        for line in table.comparisons(one, [*found[:3], row("cosine", 0, 12.0), row("cosine", 1, 22.1)])
        if line.arm == ("cosine",)
    ][:1]
    assert turned.verdict == "no"
    shown = table.markdown(one, table.comparisons(one, close))
    assert "| cosine | fd_fashion (FID) | 2 | -1 | 17.9 | -2.1 | -2.35 to -1.85 | yes | 3 | reduced |" in shown
    assert "| sigmoid | fd_fashion (FID) | 2.5 | -0.5 | – | – | – | – | 0 | not run |" in shown


def test_comparisons_reject_two_protocols(toy):
    other = protocol.with_protocol_hash({"network": "toy", "n": 100, "sampler": "heun()"})
    one = study.read(toy)
    found = [row("linear", 0, 10.0), row("cosine", 0, 9.0, **other)]
    with pytest.raises(
        UserError,
        match=r"two protocols, not one: score/sampler is ddim\(eta=0\) for linear seed 0 and heun\(\) for cosine",
    ):
        table.comparisons(one, found)
    (toy / "study.yaml").write_text(STUDY + "differs: [sampler]\n")
    asked = study.read(toy)
    assert table.comparisons(asked, found)
    with pytest.raises(UserError, match="score/sampler"):  # but never between the seeds of an arm
        table.comparisons(asked, [*found, row("cosine", 1, 9.0)])
    unsaid = {key: value for key, value in found[0].items() if not key.startswith("score/")}
    with pytest.raises(UserError, match="is unset for"):
        table.comparisons(one, [unsaid, row("cosine", 0, 9.0)])


def test_collect_matches_runs_by_config_and_preserves_rows(toy, capsys):
    one = study.read(toy)
    every = collect.study_jobs(one)
    assert [(job.lookup("schedule"), job.lookup("seed")) for job in every] == [
        ("linear", 0),
        ("linear", 1),
        ("cosine", 0),
        ("cosine", 1),
    ]
    ran(every[0], prefix="of_another_study-", fd_fashion=3.0, accuracy=0.5)
    folder = ran(every[1], fd_fashion=3.99499996)  # the table is of what the csv keeps of it
    older = serialize.load_config(folder / "config.yaml")
    del older["max_skipped_steps"], older["training"]["grad_clip_norm"]  # made when there were fewer options
    serialize.save_config(older, folder / "config.yaml")
    folder.rename(folder.with_name("fashion_mnist-00000000-s1"))
    unfinished = ran(every[2], fd_fashion=5.0)
    (unfinished / "metrics.json").unlink()
    rows.write(
        toy / "results.csv",
        [{"job": collect.job_id(every[3]), "schedule": "cosine", "seed": 1, "fd_fashion": 2.5, **SAID}],
    )

    assert run_guarded(lambda: __main__.main(["experiments/toy"])) == 0
    assert "3 rows, 1 jobs without a result" in capsys.readouterr().out
    kept = rows.read(toy / "results.csv")
    assert [(one["schedule"], one["seed"], one["fd_fashion"]) for one in kept] == [
        ("linear", "0", "3"),
        ("linear", "1", "3.995"),
        ("cosine", "1", "2.5"),
    ]
    assert (kept[0]["commit"], kept[0]["seconds"], kept[0]["protocol"]) == ("0123456789ab+", "9", SAID["protocol"])
    readme = (toy / "README.md").read_text()
    assert table.read_block(readme, "table") == table.markdown(one, table.comparisons(one, kept))
    assert "-1.5" in readme
    assert 1000 < (toy / "figure.png").stat().st_size < 100_000
    assert "[toy](toy/README.md)" in (toy.parent / "README.md").read_text()
    before = readme
    Path("runs").rename("elsewhere")
    assert run_guarded(lambda: __main__.main(["experiments/toy"])) == 0  # as on another machine: the csv says it all
    assert (toy / "README.md").read_text() == before


def test_collect_reads_wandb_project(toy, monkeypatch):
    one = study.read(toy)
    first = collect.study_jobs(one)[0]
    name = f"fashion_mnist-{collect.job_id(first)}"
    done = SimpleNamespace(
        name=name, state="finished", commit="abcdef0123456789", summary={"fd_fashion": 7.0, "_step": 3, **SAID}
    )
    asked = []
    api = SimpleNamespace(runs=lambda project: asked.append(project) or [done, SimpleNamespace(state="running")])
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda timeout: api))
    found, missing = collect.collect_results(one, (), "me/ldm")
    assert asked == ["me/ldm"]
    assert (len(found), len(missing)) == (1, 3)
    assert (found[0]["fd_fashion"], found[0]["schedule"], found[0]["protocol"]) == (7.0, "linear", SAID["protocol"])


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (STUDY.replace("axes", "axis"), "no key 'axis'; did you mean 'axes'"),
        (STUDY.replace("scale: reduced", "scale: small"), "scale=small: expected full or reduced"),
        (STUDY.replace("axes: [schedule]", "axes: schedule"), "axes=schedule: expected a list"),
        (STUDY.replace("baseline: {schedule: linear}", "baseline: {}"), "does not specify schedule"),
        (STUDY.replace("question: is cosine better?", ""), "question is missing"),
    ],
)
def test_study_rejects_missing_fields(toy, said, expected, capsys):
    (toy / "study.yaml").write_text(said)
    assert run_guarded(lambda: __main__.main(["experiments/toy"])) == 2
    assert expected in capsys.readouterr().err
    assert not (toy / "README.md").exists()


def test_pareto_returns_undominated_points():
    points = {("a",): (1.0, 9.0), ("b",): (2.0, 5.0), ("c",): (3.0, 6.0), ("d",): (4.0, 5.0)}
    assert figure.pareto(points, True, True) == [("a",), ("b",)]
    assert figure.pareto(points, False, True) == [("d",)]


def test_figure_of_points_is_written(toy, tmp_path):
    (toy / "study.yaml").write_text(
        STUDY.replace("axes: [schedule]", "axes: [schedule, steps]").replace("{schedule:", "{steps: 5, schedule:")
    )
    with (toy / "study.yaml").open("a") as file:
        file.write("figure: {x: nfe, y: fd_fashion, line: schedule}\n")
    found = [
        row(schedule, 0, 100.0 / steps, steps=steps, nfe=steps)
        for schedule in ("linear", "cosine")
        for steps in (5, 10, 40)
    ]
    assert figure.write(study.read(toy), found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size < 100_000
    assert not figure.write(study.read(toy), [], tmp_path / "none.png")


def test_sparkline_scales_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8, 0, 7) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 10, 100], 3, 1, 100) == "▁▅█"  # of losses the logarithm
    assert sparkline(list(range(100)), 4, 0, 99) == "▂▄▆█"
    assert sparkline([3], 8, 3, 3) == "▁"


def test_runs_are_printed_next_to_each_other(toy, capsys):
    every = collect.study_jobs(study.read(toy))
    for i in (0, 2):
        journal = metrics_log.MetricsLog(ran(every[i], fd_fashion=3.0 + i) / "metrics.jsonl")
        for step in range(1, 30):
            journal.write(step, {"train/loss": (i + 1) / step})
    capsys.readouterr()
    assert run_guarded(lambda: __main__.main(["compare", "runs"])) == 0
    said = capsys.readouterr().out
    assert "schedule._target_" in said
    assert "ldm.diffusion.schedule.cosine" in said
    assert "train/loss" in said
    assert "0.1034" in said  # where the curve of the second ends
    assert "seed" not in said
    page = Path("compare.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http-equiv", "")
    assert format_comparison([browse.read_run(folder) for folder in browse.find_runs(["runs"])]) in said
    assert run_guarded(lambda: __main__.main(["compare", "runs/" + next(Path("runs").iterdir()).name])) == 2
    assert "expected two runs or more" in capsys.readouterr().err


STUDIES = study.all_studies(ROOT / "experiments")


@pytest.mark.parametrize("one", STUDIES, ids=lambda one: one.name)
def test_study_readme_matches_csv(one):
    kept = rows.read(one.folder / "results.csv")
    readme = (one.folder / "README.md").read_text()
    for line in table.markdown(one, table.comparisons(one, kept)).splitlines():
        if "| not run |" not in line:  # a job of the sweep that is planned stands there too
            assert line in readme.splitlines(), f"python -m ldm.report experiments/{one.name} writes it anew"
    assert (one.folder / "figure.png").is_file() == bool(kept)
    assert "## Verdict" in readme


def test_studies_table_matches_csvs():
    kept = {one.name: (one, table.comparisons(one, rows.read(one.folder / "results.csv"))) for one in STUDIES}
    shown = table.read_block((ROOT / "experiments" / "README.md").read_text(), "studies")
    assert shown == table.overview(kept), "python -m ldm.report updates experiments/README.md"


def test_scores_table_equals_stored_metrics():
    """The scores in experiments/README.md are those of quickstart/metrics.json, and the top README quotes them."""
    spec = importlib.util.spec_from_file_location("keep", ROOT / "experiments" / "quickstart" / "keep.py")
    keep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keep)
    metrics = json.loads((ROOT / "experiments" / "quickstart" / "metrics.json").read_text())
    shown = table.read_block((ROOT / "experiments" / "README.md").read_text(), "scores")
    assert shown == keep.table(metrics), "python experiments/quickstart/keep.py RUN updates experiments/README.md"
    names = ("fd_fashion", "accuracy", "baseline/test/fd_fashion", "baseline/noisy/fd_fashion")
    quoted = (ROOT / "README.md").read_text()
    assert all(f" {metrics[name]:.3g}" in quoted for name in names)
