"""Collect the rows of a study: from its jobs' run folders or, for runs not on this machine, its results.csv."""

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
    """Compose the jobs of a study's sweeps, without duplicates.  Raises UserError."""

    jobs = [
        job
        for sweep in study.sweeps
        for job in compose.compose_jobs("train", [f"experiment={study.name}/{sweep}", *typed], study.config_dir)
    ]
    return list({job_id(job): job for job in jobs}.values())


def job_id(job: compose.ComposedJob) -> str:
    """Return the id of a job, the same in every study: its config's hash and its seed."""
    return identity.run_id(job.config)


def find_run(job: compose.ComposedJob) -> Path | None:
    """Return the finished run of a job in the folder that its config names, or None.

    The run is identified by its name or, failing that, by a config that differs only in keys that one of the two does
    not
    have: an older version of the code had fewer options, each of which had its present default.
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


def configs_agree(a: Any, b: Any) -> bool:
    """Return whether plain data differ only in keys that one of the two lacks."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return "damaged" not in b and all(configs_agree(a[key], b[key]) for key in a.keys() & b.keys())
    return a == b


def result_row(study: Study, job: compose.ComposedJob, folder: Path) -> dict[str, Any]:
    """Build the row of a finished run: job, axes, seed, numbers, protocol, cost and commit."""
    metrics = metrics_log.read_final_metrics(folder) or {}
    metrics |= {} if "protocol" in metrics else infer_protocol(folder, metrics)
    plain = {name: value for name, value in metrics.items() if "/" not in name or name in study.metrics}
    numbers = {
        name: value
        for name, value in plain.items()
        if isinstance(value, int | float) and name not in ("seed", "seconds")
    }
    row = {"job": job_id(job), **{axis: job.lookup(axis) for axis in study.axes}, "seed": job.config["seed"]}
    row |= {name: numbers[name] for name in study.metrics if name in numbers} | numbers
    row |= {"seconds": metrics.get("seconds"), "commit": commit_of(folder), "protocol": metrics.get("protocol")}
    return row | {name: value for name, value in metrics.items() if name.startswith("score/")}


def infer_protocol(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the protocol of a run of an older version, which did not store it, from its folder and cached evaluator.

    Returns {} if the evaluator is not in the cache, or is not the one that scored the run.
    """
    from ldm.checkpoint.load import latent_space_of, load_data_card, load_run_config
    from ldm.evaluation import evaluator, protocol
    from ldm.evaluation.evaluate import EvaluationConfig
    from ldm.metrics.distribution import MetricSuite
    from ldm.recipes import diffusion
    from ldm.runs.cache import evaluator_entry

    if "arithmetic" not in metrics:  # the run was not scored
        return {}
    cfg, config = load_run_config(folder), serialize.load_config(folder / "config.yaml")
    evaluator_folder = evaluator_entry(cfg).folder
    if metrics_log.read_final_metrics(evaluator_folder) is None or "net" in config["metrics"]:
        return {}
    network = MetricSuite(*evaluator.load_evaluator(cfg, evaluator_folder), {}).provenance
    score = EvaluationConfig(
        **{name: value for name, value in config["training"]["score"].items() if name != "_target_"}
    )
    values = {**metrics, **{f"score/{name}": value for name, value in network.items()}}
    return protocol.with_protocol_hash(
        diffusion.evaluation_protocol(
            config, score, values, load_data_card(folder).fingerprint, latent_space_of(folder)
        )
    )


def commit_of(folder: Path) -> str:
    """Return the commit that a run was trained at, with + if files differed from it."""
    file = folder / "provenance.json"
    origin = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return f"{origin['commit'][:12]}{'+' if origin.get('changed') else ''}" if origin.get("commit") else ""


def collect_results(
    study: Study, typed: Sequence[str] = (), project: str | None = None
) -> tuple[list[rows.Row], list[compose.ComposedJob]]:
    """Return the rows of a study in its jobs' order and the jobs without a row; for a study of points, stored rows.

    project: a Weights & Biases project to read instead of run folders.  Raises UserError.
    """
    stored = rows.read(study.folder / "results.csv")
    if study.is_sampling_study:
        return list(stored), []
    by_job = {row["job"]: row for row in stored if "job" in row}
    results: list[rows.Row] = []
    missing = []
    remote = wandb_rows(study, project) if project else {}
    for job in study_jobs(study, typed):
        folder = find_run(job) if not project else None
        if folder is not None:
            results.append(result_row(study, job, folder))
        elif (name := job_id(job)) in remote:
            results.append(
                {
                    "job": name,
                    **{axis: job.lookup(axis) for axis in study.axes},
                    "seed": job.config["seed"],
                    **remote[name],
                }
            )
        elif name in by_job:
            results.append(by_job[name])
        else:
            missing.append(job)
    return results, missing


def wandb_rows(study: Study, project: str) -> dict[str, dict[str, Any]]:
    """Return each job's numbers, of a W&B project's finished runs, named as their folders.  Raises UserError."""
    with extra("wandb", f"wandb={project}"):
        import wandb

    try:
        runs = [run for run in wandb.Api(timeout=20).runs(project) if run.state == "finished"]
    except Exception as error:
        raise UserError(
            f"wandb={project}: {' '.join(str(error).split())[:200]}; expected entity/project and a key"
        ) from None
    results = {}
    for run in runs:
        summary = {key: value for key, value in dict(run.summary).items() if not key.startswith("_")}
        numbers = {
            key: value
            for key, value in summary.items()
            if key in study.metrics or key in ("n", "guidance", "seconds", "protocol")
        }
        job = "-".join(run.name.split("-")[-2:])
        results[job] = {
            **numbers,
            "commit": (run.commit or "")[:12],
            **{k: v for k, v in summary.items() if k.startswith("score/")},
        }
    return results
