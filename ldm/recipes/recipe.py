"""The interface of a recipe: what `training._target_` names, and how a recipe is looked up and built."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from hydra.utils import get_object, instantiate

from ldm.errors import UserError
from ldm.runs.cache import CacheEntry


class Recipe(Protocol):
    """A training: a class whose constructor takes the options of the config's `training` node.

    `run_dir` and `dependencies` are static: a sweep calls them for each of its jobs, where building the networks and
    losses of every job would take memory, time and downloads.
    """

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder that the run of a config writes to."""
        ...

    @staticmethod
    def dependencies(cfg: Any) -> list[CacheEntry]:
        """Return what must be trained before the run of a config can start, finished or not."""
        ...

    def train(self, cfg: Any) -> float | None:
        """Train, write the run folder and return the number that a sweep optimizes, at once if the run is done."""
        ...


METHODS = tuple(name for name in vars(Recipe) if not name.startswith("_"))


def recipe_class(node: Mapping[str, Any]) -> type[Recipe]:
    """Return the class that a `training` node names, without building anything.

    Raises UserError if it is not a class with the methods of Recipe.
    """
    name = node["_target_"]
    target = get_object(name)
    if missing := [method for method in METHODS if not _has_method(target, method)]:
        raise UserError(
            f"training._target_={name}: expected a class with static methods run_dir(cfg) and dependencies(cfg) and a "
            f"method train(cfg), as in ldm.recipes.recipe.Recipe; {', '.join(missing)} missing or not static"
        )
    return target


def build_recipe(node: Mapping[str, Any]) -> Recipe:
    """Build the recipe of a `training` node with its optimizers and losses. Raises UserError as recipe_class does.

    Its lists and dicts are plain: a node of the config among an optimizer's options would stay in its state, and a
    checkpoint could not be loaded with weights_only.
    """
    recipe_class(node)
    return instantiate(node, _convert_="all")


def _has_method(target: Any, name: str) -> bool:
    """Return whether a class has a method of Recipe, static where that one is."""
    static = isinstance(vars(Recipe)[name], staticmethod)
    method = inspect.getattr_static(target, name, None)
    return inspect.isclass(target) and (
        isinstance(method, staticmethod | classmethod) if static else callable(getattr(target, name, None))
    )
