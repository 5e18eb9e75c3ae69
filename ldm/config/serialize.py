"""Read and write resolved configs as YAML files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config.overrides import escape, unescape
from ldm.config.tree import map_strings
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_yaml


def write_config(plain: Mapping[str, Any], folder: Path, choices: Mapping[str, str] | None = None) -> Path:
    """Write a resolved config (plain data) as `folder`/config.yaml, which a command reads with --config-path.

    choices: config group -> option, stored next to it as choices.json.  Returns the path of config.yaml.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "choices.json").write_text(json.dumps(dict(choices or {})))
    save_config(plain, folder / "config.yaml")
    return folder / "config.yaml"


def save_config(config: Mapping[str, Any], path: Path | str) -> None:
    """Write resolved plain data as YAML that Hydra and `load_config` read back to the same values."""
    from omegaconf import (
        OmegaConf,
    )  # its dumper quotes strings that its loader, unlike PyYAML's, parses as numbers: 1e-3

    atomic.write_text(path, OmegaConf.to_yaml(OmegaConf.create(map_strings(dict(config), escape))))


def load_config(path: Path | str) -> dict[str, Any]:
    """Return the plain data of a saved config; nothing in it is resolved or instantiated.

    Raises UserError naming the file if it is missing, unreadable or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: {path.parent} is not a run folder")
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no config")
    return map_strings(config, unescape)
