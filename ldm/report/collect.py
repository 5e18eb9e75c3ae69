"""The rows of a study: what its jobs' run folders say, and what its results.csv kept of those that are not here."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ldm import jobs, runs
from ldm.errors import UserError
from ldm.parse import json_of
from ldm.report import rows
from ldm.report.study import Study


def wanted(study: Study, typed: Sequence[str] = ()) -> list[jobs.Composed]:
    """The jobs of a study's sweeps, each once. Raises UserError."""
    from ldm.build import SUPPLIED

    every = [job for sweep in study.sweeps for job in jobs.composed("train", [f"experiment={study.name}/{sweep}", *typed], SUPPLIED)]
    return list({name_of(job): job for job in every}.values())


def name_of(job: jobs.Composed) -> str:
    """What a job is known by in every study: its config's hash and its seed."""
    return runs.run_id(job.config)


def folder_of(job: jobs.Composed) -> Path | None:
    """The finished run of a job, wherever its config says that runs are; None where there is none.

    It is found by its name; or else by a config that differs in nothing but keys that one of the two does not have: a version of the code
    that had fewer options, of which each had its default.
    """
    home = Path(job.config["runs"]).expanduser()
    named = [path for path in (home / name_of(job), *home.glob(f"*-{name_of(job)}")) if runs.finished(path) is not None]
    if named:
        return named[0]
    bare = runs.without(job.config, runs.RUN_ONLY)
    of_seed = (path for path in sorted(home.glob(f"*-s{job.config['seed']}")) if runs.finished(path) is not None)
    return next((path for path in of_seed if agree(bare, _config(path))), None)


@cache
def _config(folder: Path) -> dict[str, Any]:
    try:
        return runs.without(runs.load_config(folder / "config.yaml"), runs.RUN_ONLY)
    except UserError:
        return {"damaged": True}


def agree(one: Any, other: Any) -> bool:
    """Whether plain data differ in nothing but keys that one of the two lacks."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return "damaged" not in other and all(agree(one[key], other[key]) for key in one.keys() & other.keys())
    return one == other


def row_of(study: Study, job: jobs.Composed, folder: Path) -> dict[str, Any]:
    """The row of a finished run: job, axes, seed, numbers, protocol, cost and commit."""
    found = runs.finished(folder) or {}
    found |= {} if "protocol" in found else restated(folder, found)
    plain = {name: value for name, value in found.items() if "/" not in name or name in study.metrics}
    numbers = {name: value for name, value in plain.items() if isinstance(value, int | float) and name not in ("seed", "seconds")}
    row = {"job": name_of(job), **{axis: job.value(axis) for axis in study.axes}, "seed": job.config["seed"]}
    row |= {name: numbers[name] for name in study.metrics if name in numbers} | numbers
    row |= {"seconds": found.get("seconds"), "commit": commit_of(folder), "protocol": found.get("protocol")}
    return row | {name: value for name, value in found.items() if name.startswith("score/")}


def restated(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol of a run that does not state its own, as those did not at first: what its folder and the judge in the cache say.

    Nothing where the judge is not in the cache, or is not what measured it.
    """
    from ldm import protocol
    from ldm.load import config_of, load_data_card, space_of
    from ldm.metrics.distribution import Score
    from ldm.score import Protocol
    from ldm.stage import cache as kept
    from ldm.stage import diffusion, judge

    if "arithmetic" not in found:  # not scored
        return {}
    cfg, config = config_of(folder), runs.load_config(folder / "config.yaml")
    place = kept.kept_judge(cfg).folder
    if runs.finished(place) is None or "net" in config["metrics"]:
        return {}
    network = Score(*judge.load(cfg, place), {}).provenance
    score = Protocol(**{name: value for name, value in config["training"]["score"].items() if name != "_target_"})
    values = {**found, **{f"score/{name}": value for name, value in network.items()}}
    return protocol.stated(diffusion.said(config, score, values, load_data_card(folder).fingerprint, space_of(folder)))


def commit_of(folder: Path) -> str:
    """The commit that a run was made at, and a + where files differed from it."""
    file = folder / "provenance.json"
    said = json_of(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return f"{said['commit'][:12]}{'+' if said.get('changed') else ''}" if said.get("commit") else ""


def collected(study: Study, typed: Sequence[str] = (), place: str | None = None) -> tuple[list[rows.Row], list[jobs.Composed]]:
    """The rows of a study in its jobs' order, and the jobs that have none. Of points, what the frontier kept.

    place: a Weights & Biases project to read instead of run folders.  Raises UserError.
    """
    kept = rows.read(study.folder / "results.csv")
    if study.of_points:
        return list(kept), []
    by_job = {row["job"]: row for row in kept if "job" in row}
    found: list[rows.Row] = []
    missing = []
    remote = wandb_rows(study, place) if place else {}
    for job in wanted(study, typed):
        folder = folder_of(job) if not place else None
        if folder is not None:
            found.append(row_of(study, job, folder))
        elif (name := name_of(job)) in remote:
            found.append({"job": name, **{axis: job.value(axis) for axis in study.axes}, "seed": job.config["seed"], **remote[name]})
        elif name in by_job:
            found.append(by_job[name])
        else:
            missing.append(job)
    return found, missing


def wandb_rows(study: Study, project: str) -> dict[str, dict[str, Any]]:
    """Job -> its numbers, of a W&B project's finished runs, whose names are those of their folders. Raises UserError."""
    import wandb

    try:
        every = [run for run in wandb.Api(timeout=20).runs(project) if run.state == "finished"]
    except Exception as error:
        raise UserError(f"wandb={project}: {' '.join(str(error).split())[:200]}; expected entity/project and a key") from None
    found = {}
    for run in every:
        summary = {key: value for key, value in dict(run.summary).items() if not key.startswith("_")}
        numbers = {key: value for key, value in summary.items() if key in study.metrics or key in ("n", "guidance", "seconds", "protocol")}
        job = "-".join(run.name.split("-")[-2:])
        found[job] = {**numbers, "commit": (run.commit or "")[:12], **{k: v for k, v in summary.items() if k.startswith("score/")}}
    return found
