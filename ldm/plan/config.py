"""The config of a command line for planning: data that nobody has here may be missing."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm import runs
from ldm.argv import Tree, rewrite, several
from ldm.build import SUPPLIED, plain
from ldm.command import Plan as Composition

ROOT = Path(__file__).resolve().parents[2]
IGNORED = (*runs.RUN_ONLY, "published", "optimize", "judge", "metrics", "budget")


def composed(typed: Sequence[str]) -> tuple[Any, dict[str, Any] | None]:
    """The config of a command line, checked as train.py checks it, and what a preset says of its data where there is no path to them.

    Raises UserError.
    """
    from omegaconf import OmegaConf

    import ldm.studies  # noqa: F401  makes experiments/ a group

    tree = Tree((ROOT / "conf",), ROOT)
    words = [rewrite(one, tree, (), ("runs", "data.path", "data.captions"), False) for one in typed]
    plan = Composition(tree, "train", False, [part for word in words for part in several(word, tree)])
    with plan.explained(SimpleNamespace(started=False)):  # type: ignore[arg-type]
        config = plan.compose(plan.overrides)
        published = plain(config.get("published")) or None
        if published is not None and OmegaConf.is_missing(config.data, "path"):
            plan.overrides.append("data.path=.")
            config.data.path = "."
        else:
            published = None
        plan.check(SUPPLIED)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]), published


def differences(cfg: Any, paper: str) -> list[str]:
    """Each key in which a config is not the preset's, as `key: the paper's -> yours`. Raises UserError for no such preset."""
    theirs, _ = composed([f"preset={paper}"])
    mine = runs.without(plain(cfg), (*IGNORED, "data"))
    return runs.differences(runs.without(plain(theirs), (*IGNORED, "data")), mine)
