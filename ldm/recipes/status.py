"""What can be said of a training before it runs, from its config and from what is on disk."""

from collections.abc import Mapping
from functools import cache as once
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm.checkpoint import step
from ldm.config import serialize
from ldm.config.build import to_container
from ldm.errors import UserError
from ldm.recipes import init_weights
from ldm.recipes.resume import KEYS_FREE_TO_DIFFER, final_metrics
from ldm.runs import cache, identity, metrics_log
from ldm.runs.status import JobStatus

SAME_COST_KEYS = (
    "data",
    "degradation",
    "autoencoder",
    "net",
    "conditioner",
    "metrics",
)  # parts of a config on which the time of a step depends


def job_status(cfg: Any) -> JobStatus:
    """Whether the run of a config is done, how far it is, what it needs, how long it may take."""
    cfg = init_weights.inherit_base_config(cfg)
    stage: Any = import_module(cfg.training["_target_"].rpartition(".")[0])
    if not hasattr(stage, "place"):  # a person's own
        return JobStatus()
    folder = stage.run_dir(cfg)
    done = final_metrics(cfg, folder)
    kept = step.list_checkpoints(folder / "checkpoints") if cfg.get("resume") != "never" else []
    return JobStatus(
        done,
        (done or {}).get(cfg.get("optimized_metric")),
        step.checkpoint_step(kept[0]) if kept else 0,
        estimate_seconds(to_container(cfg), folder),
        {one.folder: partial(cache.ensure_trained, cfg, one) for one in stage.dependencies(cfg) if not one.finished},
    )


def estimate_seconds(config: Mapping[str, Any], folder: Path) -> float | None:
    """Seconds that the finished run beside `folder` took whose config is nearest, its steps scaled to this one's; None without one."""
    found = []
    for place in folder.parent.glob("*/metrics.json"):
        other, seconds = read_past_run(place)
        if (
            other
            and seconds
            and all(other.get(part) == config.get(part) for part in SAME_COST_KEYS)
            and batch(other) == batch(config)
        ):
            far = len(
                identity.config_diff(
                    identity.drop_keys(other, KEYS_FREE_TO_DIFFER), identity.drop_keys(config, KEYS_FREE_TO_DIFFER)
                )
            )
            found.append((far, place, seconds * config["training"]["steps"] / other["training"]["steps"]))
    return min(found)[2] if found else None


def batch(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return config["training"]["_target_"], config["training"].get("batch_size")


@once
def read_past_run(place: Path) -> tuple[dict[str, Any], float | None]:
    """Config and seconds of a finished run; nothing of a damaged one."""
    try:
        return serialize.load_config(place.with_name("config.yaml")), (
            metrics_log.read_final_metrics(place.parent) or {}
        ).get("seconds")
    except (UserError, ValueError, FileNotFoundError):
        return {}, None
