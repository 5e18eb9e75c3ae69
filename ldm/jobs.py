"""The jobs that a command line stands for, composed and checked but not run."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm.argv import Tree, rewrite, several
from ldm.build import plain

ROOT = Path(__file__).resolve().parents[1]
TEXT = ("prompt", "negative", "source", "precision")
PATHS = ("run", "runs", "out", "init", "resume", "label", "prompts", "data.path", "data.captions", "guidance.classifier")


@dataclass(frozen=True)
class Composed:
    """One job: the overrides that make it, its config as the task would be given it, and the option chosen in each group."""

    overrides: Sequence[str]
    cfg: Any
    choices: Mapping[str, str]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Plain data, interpolations resolved."""
        return plain(self.cfg)

    def value(self, key: str) -> Any:
        """The option of a group, or the value at a dotted key of the config; None where there is neither."""
        node: Any = self.choices.get(key, self.config)
        if key in self.choices:
            return node
        for name in key.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        return node


def composed(script: str, typed: Sequence[str], supplied: Mapping[str, Collection[str]] | None = None) -> list[Composed]:
    """The jobs of `python SCRIPT.py -m TYPED`, in its order. Raises UserError for what the command would refuse.

    supplied: as ldm.command.command has it.
    """
    from omegaconf import OmegaConf

    import ldm.studies  # noqa: F401  makes experiments/ a group
    from ldm.command import Plan
    from ldm.validate import validate

    tree = Tree((ROOT / "conf",), ROOT)
    written = [rewrite(one, tree, TEXT, PATHS, True) for one in typed]
    plan = Plan(tree, script, True, [one for override in written for one in several(override, tree)])
    jobs = []
    with plan.explained(SimpleNamespace(started=False)):  # type: ignore[arg-type]
        for overrides in plan.jobs():
            config = plan.compose(overrides)
            chosen = {name: option for name, option in config.hydra.runtime.choices.items() if option is not None and "/" not in name}
            jobs.append(Composed(overrides, OmegaConf.masked_copy(config, [name for name in config if name != "hydra"]), chosen))
            validate(jobs[-1].config, None, supplied)
    return jobs
