"""Compose the config for planning: the data set need not exist on this machine."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm.config.build import to_container
from ldm.config.compose import Composition
from ldm.config.overrides import ConfigSearchPath, expand_group_list, normalize_override
from ldm.runs import identity

ROOT = Path(__file__).resolve().parents[2]
IGNORED = (*identity.NOT_HASHED, "paper", "optimized_metric", "evaluator", "metrics", "budget")


def composed(typed: Sequence[str]) -> tuple[Any, dict[str, Any] | None]:
    """Compose the config of a command line, validated as train.py does.

    Returns the config, and the preset's metadata of the paper's data set if `data.path` is not set, else None.
    Raises UserError.
    """
    from omegaconf import OmegaConf

    import ldm.config.search_path  # noqa: F401  registers experiments/ as a config group

    tree = ConfigSearchPath((ROOT / "conf",), ROOT)
    words = [normalize_override(one, tree, (), ("runs", "data.path", "data.captions"), False) for one in typed]
    plan = Composition(tree, "train", False, [part for word in words for part in expand_group_list(word, tree)])
    with plan.translate_errors(SimpleNamespace(started=False)):  # type: ignore[arg-type]
        config = plan.compose(plan.overrides)
        published = to_container(config.get("paper")) or None
        if published is not None and OmegaConf.is_missing(config.data, "path"):
            plan.overrides.append("data.path=.")
            config.data.path = "."
        else:
            published = None
        plan.check()
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), published


def differences(cfg: Any, paper: str) -> list[str]:
    """List the keys in which a config differs from the preset's, as `key: the paper's -> yours`.

    Raises UserError if there is no such preset.
    """
    theirs, _ = composed([f"preset={paper}"])
    ours = identity.drop_keys(to_container(cfg), (*IGNORED, "data"))
    return identity.config_diff(identity.drop_keys(to_container(theirs), (*IGNORED, "data")), ours)
