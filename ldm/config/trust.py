"""Configs that came with a file, of a run, a checkpoint or an image: they may make a model, and nothing else.

What a person types may call any library (ldm.config.validate). What a file says may have been written by anybody.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.config.build import RUNTIME_PARAMETERS
from ldm.config.overrides import escape
from ldm.config.tree import iter_nodes, map_strings
from ldm.config.validate import check_target_allowed, find_module, is_user_code, resolve_definition, validate
from ldm.errors import UserError

ALLOWED_LDM_TARGETS = re.compile(  # what makes models, data and samples; not what writes files, fetches or starts processes
    r"ldm\.((adapter|autoencoder|conditioner|diffusion|metrics|net|objective|score|source|task)\..+"
    r"|data\.((degrade|masks)\.\w+|\w+\.[A-Z]\w*)|recipes\.\w+\.\w+Recipe|training\.(fit|lr|debug|optimizers)\.\w+|load\.(autoguidance|teacher))"
)
LIBRARIES = ("torch.nn", "torch.optim")
REPOSITORY_SCRIPTS = ("conf", "experiments", "sample", "tests", "train")  # of the repository: commands, not parts


def sanitize_config(given: Mapping[str, Any], where: Path | str) -> Any:
    """The config as OmegaConf's, every text in it literal, less its logger: who was told of a run makes no model.

    Raises UserError naming the file `where` for one that may not be built.
    """
    from omegaconf import OmegaConf

    given = {key: value for key, value in given.items() if key != "logger"}
    try:
        for path, node in iter_nodes(given):
            check_target(node["_target_"], path)
        validate(given, None, RUNTIME_PARAMETERS)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return OmegaConf.create(map_strings(given, escape))


def check_target(name: str, path: str = "") -> None:
    """Raises UserError unless a found config may name this target."""
    check_target_allowed(name, path)
    top, *inner = name.split(".")
    known = (
        ALLOWED_LDM_TARGETS.fullmatch(resolve_definition(name) or "")
        or _in_allowed_library(name)
        or _in_user_package(name)
        or top in os.environ.get("LDM_TRUST", "").split(",")
    )
    if not known or any(part.startswith("_") for part in inner):
        raise UserError(
            f"{path}._target_={name} is refused: what comes with a file may name parts of ldm's models, {', '.join(LIBRARIES)} and your "
            f"own packages; if you trust it with more, LDM_TRUST={top} says so"
        )


def _in_allowed_library(name: str) -> bool:
    """Whether a target is something that a module of the listed libraries itself gives: no way through it to what it imports."""
    return name.startswith(tuple(f"{library}." for library in LIBRARIES)) and len(find_module(name)[1]) == 1


def _in_user_package(name: str) -> bool:
    """Whether a target is defined in a person's own package."""
    top = name.split(".")[0]
    return top != "ldm" and top not in REPOSITORY_SCRIPTS and is_user_code(top) and resolve_definition(name) is not None


@contextmanager
def construction_errors(where: Path | str) -> Iterator[None]:
    """Within it, whatever goes wrong in making what a file describes is that file's fault: UserError naming it."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(
            cause, UserError | FileNotFoundError
        ):  # says itself what is wrong, a text encoder's missing weights for one
            raise
        said = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"{where}: no model can be made of its config ({said:.200})") from error
