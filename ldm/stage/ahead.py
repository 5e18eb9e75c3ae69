"""What can be said of a training before it runs, from its config and from what is on disk."""

from collections.abc import Mapping
from functools import cache as once
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from ldm import adapted, durable, runs
from ldm.build import plain
from ldm.errors import UserError
from ldm.stage import cache
from ldm.stage.resume import FREE, finished
from ldm.sweep import Known

ALIKE = ("data", "degrade", "autoencoder", "net", "conditioner", "metrics")  # parts of a config on which the time of a step depends


def known(cfg: Any) -> Known:
    """Whether the run of a config is done, how far it is, what it needs, how long it may take."""
    cfg = adapted.settled(cfg)
    stage: Any = import_module(cfg.training["_target_"].rpartition(".")[0])
    if not hasattr(stage, "place"):  # a person's own
        return Known()
    folder = stage.place(cfg)
    done = finished(cfg, folder)
    kept = durable.steps(folder / "checkpoints") if cfg.get("resume") != "never" else []
    return Known(
        done,
        (done or {}).get(cfg.get("optimize")),
        durable.step_of(kept[0]) if kept else 0,
        like(plain(cfg), folder),
        {one.folder: partial(cache.ensured, cfg, one) for one in stage.needs(cfg) if not one.finished},
    )


def like(config: Mapping[str, Any], folder: Path) -> float | None:
    """Seconds that the finished run beside `folder` took whose config is nearest, its steps scaled to this one's; None without one."""
    found = []
    for place in folder.parent.glob("*/metrics.json"):
        other, seconds = past(place)
        if other and seconds and all(other.get(part) == config.get(part) for part in ALIKE) and batch(other) == batch(config):
            far = len(runs.differences(runs.without(other, FREE), runs.without(config, FREE)))
            found.append((far, place, seconds * config["training"]["steps"] / other["training"]["steps"]))
    return min(found)[2] if found else None


def batch(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return config["training"]["_target_"], config["training"].get("batch_size")


@once
def past(place: Path) -> tuple[dict[str, Any], float | None]:
    """Config and seconds of a finished run; nothing of a damaged one."""
    try:
        return runs.load_config(place.with_name("config.yaml")), (runs.finished(place.parent) or {}).get("seconds")
    except (UserError, ValueError, FileNotFoundError):
        return {}, None
