"""The rows of a study: what its jobs' run folders say, and what its results.csv kept of those that are not here."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ldm.config import compose, serialize
from ldm.errors import UserError
from ldm.io.extras import extra
from ldm.io.parse import parse_json
from ldm.report import rows
from ldm.report.study import Study
from ldm.runs import identity, metrics_log


def study_jobs(study: Study, typed: Sequence[str] = ()) -> list[compose.ComposedJob]:
    """The jobs of a study's sweeps, each once. Raises UserError."""
    from ldm.config.build import RUNTIME_PARAMETERS

    every = [
        job
        for sweep in study.sweeps
        for job in compose.compose_jobs("train", [f"experiment={study.name}/{sweep}", *typed], RUNTIME_PARAMETERS)
    ]
    return list({job_id(job): job for job in every}.values())


def job_id(job: compose.ComposedJob) -> str:
    """What a job is known by in every study: its config's hash and its seed."""
    return identity.run_id(job.config)


def find_run(job: compose.ComposedJob) -> Path | None:
    """The finished run of a job, wherever its config says that runs are; None where there is none.

    It is found by its name; or else by a config that differs in nothing but keys that one of the two does not have: a version of the code
    that had fewer options, of which each had its default.
    """
    home = Path(job.config["runs"]).expanduser()
    named = [
        path
        for path in (home / job_id(job), *home.glob(f"*-{job_id(job)}"))
        if metrics_log.read_final_metrics(path) is not None
    ]
    if named:
        return named[0]
    bare = identity.drop_keys(job.config, identity.NOT_HASHED)
    of_seed = (
        path
        for path in sorted(home.glob(f"*-s{job.config['seed']}"))
        if metrics_log.read_final_metrics(path) is not None
    )
    return next((path for path in of_seed if configs_agree(bare, _config(path))), None)


@cache
def _config(folder: Path) -> dict[str, Any]:
    try:
        return identity.drop_keys(serialize.load_config(folder / "config.yaml"), identity.NOT_HASHED)
    except UserError:
        return {"damaged": True}


def configs_agree(one: Any, other: Any) -> bool:
    """Whether plain data differ in nothing but keys that one of the two lacks."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return "damaged" not in other and all(configs_agree(one[key], other[key]) for key in one.keys() & other.keys())
    return one == other


def result_row(study: Study, job: compose.ComposedJob, folder: Path) -> dict[str, Any]:
    """The row of a finished run: job, axes, seed, numbers, protocol, cost and commit."""
    found = metrics_log.read_final_metrics(folder) or {}
    found |= {} if "protocol" in found else infer_protocol(folder, found)
    plain = {name: value for name, value in found.items() if "/" not in name or name in study.metrics}
    numbers = {
        name: value
        for name, value in plain.items()
        if isinstance(value, int | float) and name not in ("seed", "seconds")
    }
    row = {"job": job_id(job), **{axis: job.lookup(axis) for axis in study.axes}, "seed": job.config["seed"]}
    row |= {name: numbers[name] for name in study.metrics if name in numbers} | numbers
    row |= {"seconds": found.get("seconds"), "commit": commit_of(folder), "protocol": found.get("protocol")}
    return row | {name: value for name, value in found.items() if name.startswith("score/")}


def infer_protocol(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """The protocol of a run that does not state its own, as those did not at first: what its folder and the judge in the cache say.

    Nothing where the judge is not in the cache, or is not what measured it.
    """
    from ldm.checkpoint.load import latent_space_of, load_data_card, load_run_config
    from ldm.evaluation import evaluator, protocol
    from ldm.evaluation.evaluate import EvaluationConfig
    from ldm.metrics.distribution import MetricSuite
    from ldm.recipes import diffusion
    from ldm.runs.cache import evaluator_entry

    if "arithmetic" not in found:  # not scored
        return {}
    cfg, config = load_run_config(folder), serialize.load_config(folder / "config.yaml")
    place = evaluator_entry(cfg).folder
    if metrics_log.read_final_metrics(place) is None or "net" in config["metrics"]:
        return {}
    network = MetricSuite(*evaluator.load_evaluator(cfg, place), {}).provenance
    score = EvaluationConfig(
        **{name: value for name, value in config["training"]["score"].items() if name != "_target_"}
    )
    values = {**found, **{f"score/{name}": value for name, value in network.items()}}
    return protocol.with_protocol_hash(
        diffusion.evaluation_protocol(
            config, score, values, load_data_card(folder).fingerprint, latent_space_of(folder)
        )
    )


def commit_of(folder: Path) -> str:
    """The commit that a run was made at, and a + where files differed from it."""
    file = folder / "provenance.json"
    said = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return f"{said['commit'][:12]}{'+' if said.get('changed') else ''}" if said.get("commit") else ""


def collect_results(
    study: Study, typed: Sequence[str] = (), place: str | None = None
) -> tuple[list[rows.Row], list[compose.ComposedJob]]:
    """The rows of a study in its jobs' order, and the jobs that have none. Of points, what the frontier kept.

    place: a Weights & Biases project to read instead of run folders.  Raises UserError.
    """
    kept = rows.read(study.folder / "results.csv")
    if study.is_sampling_study:
        return list(kept), []
    by_job = {row["job"]: row for row in kept if "job" in row}
    found: list[rows.Row] = []
    missing = []
    remote = wandb_rows(study, place) if place else {}
    for job in study_jobs(study, typed):
        folder = find_run(job) if not place else None
        if folder is not None:
            found.append(result_row(study, job, folder))
        elif (name := job_id(job)) in remote:
            found.append(
                {
                    "job": name,
                    **{axis: job.lookup(axis) for axis in study.axes},
                    "seed": job.config["seed"],
                    **remote[name],
                }
            )
        elif name in by_job:
            found.append(by_job[name])
        else:
            missing.append(job)
    return found, missing


def wandb_rows(study: Study, project: str) -> dict[str, dict[str, Any]]:
    """Job -> its numbers, of a W&B project's finished runs, whose names are those of their folders. Raises UserError."""
    with extra("wandb", f"wandb={project}"):
        import wandb

    try:
        every = [run for run in wandb.Api(timeout=20).runs(project) if run.state == "finished"]
    except Exception as error:
        raise UserError(
            f"wandb={project}: {' '.join(str(error).split())[:200]}; expected entity/project and a key"
        ) from None
    found = {}
    for run in every:
        summary = {key: value for key, value in dict(run.summary).items() if not key.startswith("_")}
        numbers = {
            key: value
            for key, value in summary.items()
            if key in study.metrics or key in ("n", "guidance", "seconds", "protocol")
        }
        job = "-".join(run.name.split("-")[-2:])
        found[job] = {
            **numbers,
            "commit": (run.commit or "")[:12],
            **{k: v for k, v in summary.items() if k.startswith("score/")},
        }
    return found
