"""The callbacks that a config names: built and checked before anything is computed."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object, instantiate

from ldm.config.overrides import did_you_mean
from ldm.errors import UserError
from ldm.training.user_callbacks import hooks_never_called, require_callback


def build_callbacks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Build the callbacks of a config's `callbacks` node, by key, in its order.

    Their options are plain lists and dicts.  Raises UserError for what cannot be imported or is no callback.
    """
    callbacks = {}
    for name, node in (config.get("callbacks") or {}).items():
        if node is None:  # callbacks.NAME=null leaves one out
            continue
        where = f"callbacks.{name}._target_={node['_target_']}"
        require_target(node["_target_"], where)
        callbacks[name] = require_callback(instantiate(node, _convert_="all"), where)
    return callbacks


def check_callbacks(config: Mapping[str, Any]) -> None:
    """Check a config's callbacks by building them once; print which of their hooks a training never calls."""
    for name, callback in build_callbacks(config).items():
        if hooks := hooks_never_called(callback):
            print(f"callbacks.{name}: {', '.join(hooks)} will not be called, see ldm/training/README.md", flush=True)


def require_target(target: str, where: str) -> None:
    """Import what a `_target_` names. Raises UserError with the closest name if there is none."""
    try:
        get_object(target)
    except Exception as error:
        module, _, name = target.rpartition(".")
        try:
            names = vars(get_object(module))
        except Exception:
            raise UserError(f"{where}: {' '.join(str(error).split())}") from error
        raise UserError(f"{where}: {module} has no {name!r}{did_you_mean(name, names)}") from None
