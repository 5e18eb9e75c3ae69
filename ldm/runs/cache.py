"""Evaluators and first stages: trained once and cached in a folder that is named by a hash of what determines them."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config import serialize
from ldm.config.build import to_container
from ldm.config.compose import current_choices
from ldm.errors import UserError
from ldm.io.download import cache_dir
from ldm.launch import process
from ldm.launch.exit_codes import STOP_EXIT_CODES
from ldm.runs import identity, metrics_log

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
# The parts of a config that determine an evaluator and a first stage.
EVALUATOR, FIRST_STAGE = ("data", "training"), ("data", "autoencoder", "training")


def evaluator_cache_key(cfg: Any) -> identity.CacheKey:
    """Return the cache key (data and training) of the evaluator that cfg trains: cfg.training is the evaluator's."""
    return identity.cache_key({name: to_container(cfg[name]) for name in EVALUATOR} | _callbacks(cfg))


def first_stage_cache_key(cfg: Any) -> identity.CacheKey:
    """Return the cache key (data, architecture, training) of the first stage that cfg trains; cfg.training is its."""
    nodes = {name: to_container(cfg[name]) for name in FIRST_STAGE}
    nodes = identity.drop_keys(nodes, ("training.health",))  # warnings change no weight
    return identity.cache_key(nodes | _callbacks(cfg))


def _callbacks(cfg: Any) -> dict[str, Any]:
    """Return the node `callbacks` of a config, which may change the weights, unless it is empty."""
    return {"callbacks": to_container(cfg["callbacks"])} if cfg.get("callbacks") else {}


def evaluator_dir(cfg: Any) -> Path:
    return cache_dir() / "evaluator" / evaluator_cache_key(cfg).key


def first_stage_dir(cfg: Any) -> Path:
    return cache_dir() / "first_stage" / first_stage_cache_key(cfg).key


def run_dir(cfg: Any, *words: str) -> Path:
    """Return the folder of a run that is not cached; words: the beginning of its name."""
    return Path(cfg.runs) / identity.run_id(
        to_container(cfg), [*words, current_choices().get("data", "data"), cfg.name]
    )


class CacheEntry(NamedTuple):
    """A folder of the cache, the key of its content, and the config that trains it there."""

    folder: Path
    recipe: identity.CacheKey
    config: Mapping[str, Any]
    devices: int

    @property
    def finished(self) -> bool:
        return metrics_log.read_final_metrics(self.folder) is not None


def evaluator_entry(cfg: Any) -> CacheEntry:
    """Return the cache entry of the evaluator that a config refers to, which is trained without callbacks."""
    config = {**to_container(cfg), "training": to_container(cfg.evaluator), "callbacks": {}}
    return CacheEntry(evaluator_dir(config), evaluator_cache_key(config), config, 1)


def first_stage_entry(cfg: Any) -> CacheEntry:
    """Return the cache entry of the first stage that a diffusion model's config refers to, without callbacks."""
    config = {**to_container(cfg), "training": to_container(cfg.first_stage), "callbacks": {}}
    return CacheEntry(
        first_stage_dir(config), first_stage_cache_key(config), config, config.get("trainer", {}).get("devices", 1)
    )


def ensure_evaluator(cfg: Any) -> Path:
    """Return the folder of the evaluator that a diffusion model's config refers to, training it if necessary."""
    return ensure_trained(cfg, evaluator_entry(cfg))


def ensure_first_stage(cfg: Any) -> Path:
    """Return the folder of the first stage that a diffusion model's config refers to, training it if necessary."""
    return ensure_trained(cfg, first_stage_entry(cfg))


def ensure_trained(cfg: Any, entry: CacheEntry) -> Path:
    """Return the folder of a cache entry, training it in a separate process unless it is finished.

    Any number of processes may call this at once: the first trains, the others wait. With cache=rebuild, changed source
    code alone also causes training.  Raises UserError if training fails; exits if it was interrupted.
    """
    from filelock import FileLock

    folder, recipe, config, devices = entry
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.asked")):
        source = folder / "source.txt"
        if metrics_log.read_final_metrics(folder) is not None:
            if not source.is_file() or source.read_text() == recipe.source:
                return folder
            if cfg.cache == "trust":
                return folder
            folder.rename(folder.with_name(f"{folder.name}-{source.read_text()}"))
        config = {**config, "trainer": {**config["trainer"], "devices": devices}}
        config |= {"logger": {"_target_": "ldm.training.loggers.NoLogger"}, "resume": "auto"}
        config.pop("debug", None)  # debugging concerns the run itself, not its dependencies
        config["keep_best"] = None  # the dependency need not log that metric
        config.pop("augmentation", None)  # it and degradations belong to the diffusion model
        config |= {"degradation": {"_target_": "ldm.data.degrade.identity", "_partial_": True}}
        if devices == 1 and config["trainer"]["strategy"] != "fsdp":  # training replaces fsdp itself, with a message
            config["trainer"]["strategy"] = "auto"
        serialize.write_config(config, folder)
        code = process.run_in_subprocess(TRAIN, folder, devices)
        if code in STOP_EXIT_CODES:
            sys.exit(code)
        if code:
            raise UserError(f"training {folder} failed with exit code {code}; its own message is above")
        source.write_text(recipe.source)
    return folder
