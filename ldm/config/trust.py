"""Configs that came with a file (a run, a checkpoint, an image) may build a model and nothing else.

What a user types may call any library (ldm.config.validate); what a file contains may have been written by anybody.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.config.overrides import escape
from ldm.config.signatures import find_module, is_user_code, resolve_definition
from ldm.config.tree import iter_nodes, map_strings
from ldm.config.validate import check_target_allowed, validate
from ldm.errors import UserError

# Models, data and samples; nothing that writes files, downloads or starts processes.
ALLOWED_LDM_TARGETS = re.compile(
    r"ldm\.((adapter|autoencoder|conditioner|diffusion|metrics|net(?!\.pretrained))\..+"
    r"|sampling\.((inputs|sounds|tasks)\.\w+|classifier_guidance\.classifier_guidance)|evaluation\.evaluate\.EvaluationConfig"
    r"|checkpoint\.teachers\.(autoguidance|load_teacher)"
    r"|data\.((color|degrade|edits|masks)\.\w+|\w+\.[A-Z]\w*)|recipes\.\w+\.\w+Recipe"
    r"|ema\.\w+EMA|training\.((fit|lr|debug|optimizers)\.\w+|validation\.ValidationConfig|health\.HealthLimits))"
)
LIBRARIES = ("torch.nn", "torch.optim")
REPOSITORY_SCRIPTS = ("conf", "experiments", "sample", "tests", "train")  # top-level names that are not model parts


def sanitize_config(config: Mapping[str, Any], where: Path | str) -> Any:
    """Return a stored config as an OmegaConf config with every string literal, without its loggers and callbacks.

    These are dropped because they are not part of the model.  where: the file that the config came from.
    Raises UserError naming the file if the config may not be built.
    """
    from omegaconf import OmegaConf

    config = {key: value for key, value in config.items() if key not in ("logger", "callbacks")}
    try:
        for path, node in iter_nodes(config):
            check_target(node["_target_"], path)
        validate(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return OmegaConf.create(map_strings(config, escape))


def check_target(name: str, path: str = "") -> None:
    """Check that a stored config may name this target.

    path: dotted path of the node, for the message.  Raises UserError otherwise.
    """
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
            f"{path}._target_={name} is refused: a config that comes with a file may use parts of ldm's models, "
            f"{', '.join(LIBRARIES)} and your own packages; to trust it with more, set LDM_TRUST={top}"
        )


def check_medium(name: str) -> None:
    """Check that a stored data card may name this medium.

    Raises UserError unless it is a module of ldm/media (a name without a dot), or one of the user's own packages.
    """
    top, *inner = name.split(".")
    if not inner:
        return
    own = top != "ldm" and top not in REPOSITORY_SCRIPTS and is_user_code(top) and _is_module(name)
    trusted = own or top in os.environ.get("LDM_TRUST", "").split(",")
    if not trusted or any(part.startswith("_") for part in inner):
        raise UserError(
            f"medium={name} is refused: data that come with a file may name a medium of ldm, or a module of your own "
            f"packages; to trust it with more, set LDM_TRUST={top}"
        )


def _is_module(name: str) -> bool:
    file, names = find_module(name)
    return file is not None and not names


def _in_allowed_library(name: str) -> bool:
    """Return whether a module of the listed libraries defines the target itself, rather than importing it."""
    return name.startswith(tuple(f"{library}." for library in LIBRARIES)) and len(find_module(name)[1]) == 1


def _in_user_package(name: str) -> bool:
    """Return whether the target is defined in the user's own package."""
    top = name.split(".")[0]
    return top != "ldm" and top not in REPOSITORY_SCRIPTS and is_user_code(top) and resolve_definition(name) is not None


@contextmanager
def construction_errors(where: Path | str) -> Iterator[None]:
    """Raise any error in building what a file describes as a UserError naming that file."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        # These name the cause themselves, for example a text encoder's missing weights.
        if isinstance(cause, UserError | FileNotFoundError):
            raise
        message = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"{where}: no model can be built from its config ({message:.200})") from error
