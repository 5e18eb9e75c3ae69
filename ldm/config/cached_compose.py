"""Compose configs with Hydra, once in a process for each choice of options.

Hydra reads and merges some fifty files for each config.  A command composes three before its task starts, and a sweep
two for each job; most of them choose the same options and differ in single values, which are set on a copy.
"""

import os
import pickle
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any


def compose_config(
    folder: Path, name: str, overrides: Sequence[str], search_path: Sequence[str] = (), sources: Sequence[Path] = ()
) -> Any:
    """Return what `hydra.compose` returns, with its `hydra` node, as a copy that the caller may change.

    folder: of the primary config.  search_path: the override that adds other sources.
    sources: their folders; a YAML file that changes in one of them or in `folder` is read again.
    Raises what Hydra raises for overrides that it refuses.
    """
    from omegaconf.errors import OmegaConfBaseException

    folders = (folder, *sources)
    place = (str(folder), name, tuple(search_path), _stamp(folders))
    composed, values = _split(overrides, folders)
    config = _copy(tuple(composed), *place)
    try:
        if all(_has_value(config, override.key_or_group) for override in values):
            return _set_values(config, values, overrides)
    except OmegaConfBaseException:
        pass  # composed once more, for Hydra's own error
    return _copy(tuple(overrides), *place)


def _copy(*key: Any) -> Any:
    """Return a copy of the composed config of a key."""
    config = pickle.loads(_compose(*key))
    config.hydra.runtime.cwd = os.getcwd()
    return config


@lru_cache(maxsize=64)
def _compose(overrides: tuple[str, ...], folder: str, name: str, search_path: tuple[str, ...], stamp: Any) -> bytes:
    """Return a config pickled: loading it is a seventh of a deepcopy.  stamp: changes with the files."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(folder, version_base="1.3"):
        return pickle.dumps(compose(name, [*overrides, *search_path], return_hydra_config=True))


def _stamp(folders: Sequence[Path]) -> frozenset[tuple[str, int, int]]:
    """Return path, time of the last change and size of every YAML file in the folders."""
    files = set()
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for path in (os.path.join(parent, name) for name in names if name.endswith((".yaml", ".yml"))):
                stat = os.stat(path)
                files.add((path, stat.st_mtime_ns, stat.st_size))
    return frozenset(files)


def _split(overrides: Sequence[str], folders: Sequence[Path]) -> tuple[list[str], list[Any]]:
    """Split overrides into those that Hydra has to compose, and parsed ones that set a value in the composed config.

    Values before an override that adds or deletes a key are left to Hydra, since their order counts.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    composed, values = list[str](), list[Any]()
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        key = override.key_or_group
        is_group = key == "experiments" or any((folder / key).is_dir() for folder in folders)
        changes = override.type == OverrideType.CHANGE and override.package is None
        if not changes or override.is_sweep_override() or (is_group and isinstance(override.value(), dict)):
            composed += [*(one.input_line for one in values), text]
            values.clear()
        elif is_group or override.is_hydra_override():
            composed.append(text)
        else:
            values.append(override)
    return composed, values


def _has_value(config: Any, key: str) -> bool:
    """Return whether a key can be set: not a node or null at the top, which may be the choice of an option."""
    from omegaconf import OmegaConf

    return "." in key or OmegaConf.is_missing(config, key) or isinstance(config[key], str | int | float)


def _set_values(config: Any, values: Sequence[Any], overrides: Sequence[str]) -> Any:
    """Set values in a composed config, and record all overrides in its `hydra` node as Hydra does."""
    from omegaconf import OmegaConf

    for override in values:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    task = [text for text in overrides if not text.lstrip("+~").startswith(("hydra.", "hydra/"))]
    config.hydra.overrides.task = task
    style = config.hydra.job.config.override_dirname
    listed = sorted(text for text in task if text.lstrip("+~").partition("=")[0] not in style.exclude_keys)
    config.hydra.job.override_dirname = style.item_sep.join(listed).replace("=", style.kv_sep)
    return config
