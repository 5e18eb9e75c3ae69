"""Compose the settings of the page to the config that `python sample.py` would have."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from ldm.config.overrides import ConfigSearchPath, escape
from ldm.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
COMPOSING = Lock()  # Hydra can compose one config at a time in a process


def compose_request(choices: Mapping[str, str], values: Mapping[str, Any]) -> Any:
    """Compose and validate the config of `python sample.py GROUP=OPTION ... KEY=VALUE ...`.

    choices: group -> option.  values: dotted key -> plain value; text is taken literally.  Raises UserError.
    """
    from omegaconf import OmegaConf

    from ldm.config.build import to_container
    from ldm.config.validate import validate

    base = composed(tuple(sorted(choices.items())))
    cfg = OmegaConf.create(base)
    for key, value in values.items():
        OmegaConf.update(cfg, key, escape(value) if isinstance(value, str) else value)
    validate(to_container(cfg), base)
    return cfg


@cache
def composed(choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    """Compose conf/sample.yaml with these options as plain data, interpolations unresolved.

    Raises UserError for an unknown option.
    """
    from omegaconf import OmegaConf

    import ldm.config.search_path  # noqa: F401  registers experiments/ as a config group
    from ldm.config.compose import Composition

    groups = ConfigSearchPath((CONF,), CONF.parent).groups()
    for group, option in choices:
        if option not in groups[group]:
            raise UserError(f"{group}={option}: expected one of {', '.join(groups[group])}")
    plan = Composition(
        ConfigSearchPath((CONF,), CONF.parent), "sample", False, [f"{group}={option}" for group, option in choices]
    )
    with COMPOSING:
        config = plan.compose(plan.overrides)
    bare = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    return OmegaConf.to_container(bare)  # type: ignore[return-value]


def available_samplers() -> list[str]:
    """List the options of conf/sampler that sample from noise with any model and any grid."""
    return [
        name
        for name in ConfigSearchPath((CONF,), CONF.parent).groups()["sampler"]
        if name not in ("ddim_invert", "ddpm_learned", "repaint")
    ]
