"""What is trained once and found again by its recipe: the judge and the first stage, each in a folder of the cache."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm import launch, runs
from ldm.build import plain
from ldm.command import STOPPED, choices
from ldm.errors import UserError
from ldm.fetch import cache_dir

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
JUDGE, FIRST_STAGE = ("data", "training"), ("data", "autoencoder", "training")  # the parts of a config that determine them


def judge_recipe(cfg: Any) -> runs.Recipe:
    """Data and training of the judge that cfg trains: cfg.training is the judge's."""
    return runs.recipe({name: plain(cfg[name]) for name in JUDGE})


def first_stage_recipe(cfg: Any) -> runs.Recipe:
    """Data, architecture and training of the first stage that cfg trains: cfg.training is the first stage's."""
    return runs.recipe({name: plain(cfg[name]) for name in FIRST_STAGE})


def judge_folder(cfg: Any) -> Path:
    return cache_dir() / "judge" / judge_recipe(cfg).key


def first_stage_folder(cfg: Any) -> Path:
    return cache_dir() / "first_stage" / first_stage_recipe(cfg).key


def run_folder(cfg: Any, *words: str) -> Path:
    """The folder of a run that nothing else is made from; words: its name begins with them."""
    return Path(cfg.runs) / runs.run_id(plain(cfg), [*words, choices().get("data", "data"), cfg.name])


class Kept(NamedTuple):
    """What belongs in a folder of the cache, and the config that trains it there."""

    folder: Path
    recipe: runs.Recipe
    config: Mapping[str, Any]
    devices: int

    @property
    def finished(self) -> bool:
        return runs.finished(self.folder) is not None


def kept_judge(cfg: Any) -> Kept:
    """The judge that a config names."""
    config = {**plain(cfg), "training": plain(cfg.judge)}
    return Kept(judge_folder(config), judge_recipe(config), config, 1)


def kept_first_stage(cfg: Any) -> Kept:
    """The first stage that a diffusion model's config names."""
    config = {**plain(cfg), "training": plain(cfg.first_stage)}
    return Kept(first_stage_folder(config), first_stage_recipe(config), config, config.get("trainer", {}).get("devices", 1))


def judge(cfg: Any) -> Path:
    """The folder of the judge that a diffusion model's config names, trained now if it is not there."""
    return ensured(cfg, kept_judge(cfg))


def first_stage(cfg: Any) -> Path:
    """The folder of the first stage that a diffusion model's config names, trained now if it is not there."""
    return ensured(cfg, kept_first_stage(cfg))


def ensured(cfg: Any, kept: Kept) -> Path:
    """The folder, after a process of its own has trained what belongs there, unless it is finished.

    Any number of processes may ask at once: the first trains, the others wait. With cache=rebuild a change of source alone trains again.
    """
    from filelock import FileLock

    folder, recipe, config, devices = kept
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.asked")):
        source = folder / "source.txt"
        if runs.finished(folder) is not None:
            if not source.is_file() or source.read_text() == recipe.source:
                return folder
            if cfg.cache == "trust":
                return folder
            folder.rename(folder.with_name(f"{folder.name}-{source.read_text()}"))
        config = {**config, "trainer": {**config["trainer"], "devices": devices}}
        config |= {"logger": {"_target_": "ldm.logger.Silent"}, "resume": "auto"}
        config.pop("debug", None)  # which is of the one run that is looked at
        config["keep_best"] = None  # whose number the training on the way need not write
        config |= {"degrade": {"_target_": "ldm.data.degrade.none", "_partial_": True}}  # which is the second stage's
        if devices == 1 and config["trainer"]["strategy"] != "fsdp":  # which the training itself replaces, and says so
            config["trainer"]["strategy"] = "auto"
        launch.write_config(config, folder)
        code = launch.run_config(TRAIN, folder, devices)
        if code in STOPPED:
            sys.exit(code)
        if code:
            raise UserError(f"training what belongs in {folder} failed with exit code {code}; its own message is above")
        source.write_text(recipe.source)
    return folder
