"""Status of a training before it runs, from its config and from what is on disk."""

from collections.abc import Mapping
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoint import step
from ldm.config import serialize
from ldm.config.build import to_container
from ldm.errors import UserError
from ldm.recipes import init_weights
from ldm.recipes.recipe import recipe_class
from ldm.recipes.resume import KEYS_FREE_TO_DIFFER, final_metrics
from ldm.runs import cache, identity, metrics_log
from ldm.runs.status import JobStatus

# parts of a config on which the time of a step depends
SAME_COST_KEYS = ("data", "degradation", "autoencoder", "net", "conditioner", "metrics")


def job_status(cfg: Any) -> JobStatus:
    """Return the status of the run of a config: final metrics, steps done, missing dependencies, seconds to expect.

    Raises UserError if `training._target_` is no recipe.
    """
    cfg = init_weights.inherit_base_config(cfg)
    recipe = recipe_class(cfg.training)
    folder = recipe.run_dir(cfg)
    metrics = final_metrics(cfg, folder)
    checkpoints = step.list_checkpoints(folder / "checkpoints") if cfg.get("resume") != "never" else []
    return JobStatus(
        metrics,
        (metrics or {}).get(cfg.get("optimized_metric")),
        step.checkpoint_step(checkpoints[0]) if checkpoints else 0,
        estimate_seconds(to_container(cfg), folder),
        {
            entry.folder: partial(cache.ensure_trained, cfg, entry)
            for entry in recipe.dependencies(cfg)
            if not entry.finished
        },
    )


def estimate_seconds(config: Mapping[str, Any], folder: Path) -> float | None:
    """Estimate the seconds of a run from the finished run beside `folder` whose config differs in the fewest keys.

    The seconds are scaled by the number of steps. Returns None without a run of the same SAME_COST_KEYS and batch size.
    """
    candidates = []
    for path in folder.parent.glob("*/metrics.json"):
        other, seconds = read_past_run(path)
        if (
            other
            and seconds
            and all(other.get(part) == config.get(part) for part in SAME_COST_KEYS)
            and recipe_and_batch_size(other) == recipe_and_batch_size(config)
        ):
            differences = identity.config_diff(
                identity.drop_keys(other, KEYS_FREE_TO_DIFFER), identity.drop_keys(config, KEYS_FREE_TO_DIFFER)
            )
            scaled = seconds * config["training"]["steps"] / other["training"]["steps"]
            candidates.append((len(differences), path, scaled))
    return min(candidates)[2] if candidates else None


def recipe_and_batch_size(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the name of the recipe and the batch size of a config, None for a recipe without one."""
    return config["training"]["_target_"], config["training"].get("batch_size")


@once
def read_past_run(path: Path) -> tuple[dict[str, Any], float | None]:
    """Read config and seconds of the finished run whose metrics.json is `path`; ({}, None) for a damaged one."""
    try:
        metrics = metrics_log.read_final_metrics(path.parent) or {}
        return serialize.load_config(path.with_name("config.yaml")), metrics.get("seconds")
    except (UserError, ValueError, FileNotFoundError):
        return {}, None
