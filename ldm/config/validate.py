"""Strict validation of a composed config against the signatures of its `_target_`s."""

import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from ldm.config.overrides import did_you_mean
from ldm.config.signatures import (
    Signature,
    find_module,
    imported_name,
    is_of_type,
    is_user_code,
    read_signature,
    read_source,
)
from ldm.config.slots import slot_of
from ldm.config.tree import iter_nodes
from ldm.errors import UserError

HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


# Parts of a library's dotted name that could execute, read or delete whatever the config's author likes, wherever they
# are in it.
FORBIDDEN_NAMES = {
    *("builtins", "ctypes", "importlib", "os", "pathlib", "pickle", "runpy", "shutil", "socket", "subprocess", "sys"),
    *("tempfile", "compile", "eval", "exec", "open", "system", "popen", "hub", "load", "load_url", "jit", "package"),
    *("cpp_extension", "serialization", "_dynamo", "_inductor", "ops", "classes"),
}


# Libraries that build objects from text.
TOOLS = ("hydra", "hydra_plugins", "omegaconf", "yaml", "joblib", "dill", "cloudpickle")


# Packages of ldm that write files, download, or start processes.
FORBIDDEN_LDM_MODULES = ("cli", "config", "io", "launch", "runs")


def validate(config: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> None:
    """Check that every node of a config, with what code passes to it, fits the signature of its `_target_`.

    config: resolved plain data.
    base: the config composed from the same group choices without other overrides, unresolved; each value must have the
        same kind as its value there.
    Raises UserError with the key, the value and what was expected.
    """
    for path, node in iter_nodes(config):
        _node(path, node)
    _check_callbacks(config.get("callbacks") or {})
    if base is not None:
        for key, value in base.items():
            if config.get(key) is None and isinstance(value, Mapping):
                raise UserError(f"{key}=null: the command needs this node; leave it out, or choose another option")
            if key not in config:
                raise UserError(f"~{key}: the command needs this key; leave it in")
        _check_kinds(config, base, "", base)


def _node(path: str, node: Mapping[str, Any]) -> None:
    target = node["_target_"]
    check_target_allowed(target, path)
    for name, kind, expectation in (
        ("_partial_", bool, "true or false"),
        ("_recursive_", bool, "true or false"),
        ("_args_", list, "a list"),
    ):
        if name in node and not isinstance(node[name], kind):
            raise UserError(f"{path}.{name}={_shown(node[name])}: expected {expectation}")
    try:
        signature = read_signature(target)
    except UserError as error:
        raise UserError(f"{path}.{error}") from None
    if signature is None:
        return
    for key, value in node.items():
        if key in HYDRA_KEYS:
            continue
        if key not in signature.parameters:
            if signature.accepts_any:
                continue
            raise UserError(
                f"{path}.{key}={_shown(value)}: {target} takes no {key!r}{did_you_mean(key, signature.parameters)}"
            )
        expected = signature.parameters[key].annotation
        if expected is not None and signature.accepts(expected, value) is False:
            raise UserError(f"{path}.{key}={_shown(value)}: {target} expects {ast.unparse(expected)}")
    slot = slot_of(path)
    if "_args_" in node:
        return
    if not node.get("_partial_"):
        passed, accepted, use = (
            {*node, *slot.supplied, *slot.required},
            slot.required,
            f"built with {slot.construction}",
        )
        _require(path, target, signature, passed, accepted, use)
    elif slot.arguments or slot.keywords:  # the call of any other is not known
        by_position = [name for name, one in signature.parameters.items() if one.positional][: len(slot.arguments)]
        if len(by_position) < len(slot.arguments) and not signature.variadic:
            count = f"{len(by_position)} positional argument{'s' * (len(by_position) != 1)}"
            raise UserError(f"{path}: {target} takes {count}, and it is called with {slot.call}")
        passed, accepted, use = {*node, *by_position, *slot.keywords}, slot.keywords, f"called with {slot.call}"
        _require(path, target, signature, passed, accepted, use)


def _require(
    path: str,
    target: str,
    signature: Signature,
    passed: Collection[str],
    accepted: Collection[str],
    use: str,
) -> None:
    """Raise UserError unless a signature takes the names `accepted`, and `passed` has each name without a default.

    use: what code does with the target, for the message.
    """
    for name in accepted:
        if name not in signature.parameters and not signature.accepts_any:
            raise UserError(f"{path}: {target} takes no {name!r}, and it is {use}")
    missing = [name for name, parameter in signature.parameters.items() if parameter.required and name not in passed]
    if missing:
        raise UserError(f"{path}: {target} also needs {', '.join(missing)}")


def _check_callbacks(callbacks: Any) -> None:
    """Check that each entry of `callbacks`, to which any key can be added, is a node or null."""
    for name, node in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if node is not None and not (isinstance(node, Mapping) and "_target_" in node):
            raise UserError(
                f"callbacks.{name}={_shown(node)}: a callback needs its _target_, as in "
                f"callbacks.{name}._target_=package.module.Class{did_you_mean(name, callbacks.keys() - {name})}"
            )


def check_target_allowed(target: Any, path: str = "") -> None:
    """Check that a `_target_` may be called: part of ldm, of an installed library, or of the user's own package.

    Whatever the user's own package defines may be called, by any name; what it imports is judged as what it is.
    path: dotted path of the node, for the message.  Raises UserError otherwise.
    """
    where = f"{path}._target_={_shown(target)}"
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{where}: expected package.module.name")
    if is_forbidden(target):
        raise UserError(
            f"{where} is refused: a config may call ldm, a library or your own package, "
            "but nothing that can run commands or delete files"
        )
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        own = f"; if it is your own, PYTHONPATH must name the folder that holds {parts[0]}/"
        hint = did_you_mean(parts[0], ["ldm", "torch"]) or own
        raise UserError(f"{where}: package {parts[0]!r} is not installed{hint}")


def is_forbidden(target: str) -> bool:
    """Return whether a dotted name could run commands or delete files: most of it the standard library and its like."""
    top, *rest = target.split(".")
    if top in sys.stdlib_module_names or top in TOOLS:
        return True
    if top == "ldm":
        return bool({*rest[:1]} & {*FORBIDDEN_LDM_MODULES})
    if not is_user_code(top):
        return bool(FORBIDDEN_NAMES & {top, *rest})
    module, names = find_module(target)
    origin = imported_name(target, read_source(target), names) if module and names else None
    return origin is not None and is_forbidden(origin)


def _check_kinds(value: Any, base: Any, path: str, root: Mapping[str, Any]) -> None:
    """Check that a node's values are of the same kind as their defaults, where the signature does not decide it.

    root: the config that `base` is part of, to look up references.
    """
    named = re.fullmatch(r"\$\{([\w.]+)\}", base) if isinstance(base, str) else None
    if named:  # a reference: only whether it refers to a node matters
        base = root
        for name in named[1].split("."):
            base = base.get(name) if isinstance(base, Mapping) else None
        base = base if isinstance(base, Mapping) else None
    if isinstance(base, Mapping) and "_target_" in base and isinstance(value, Mapping) and "_target_" not in value:
        raise UserError(f"{path}: a node needs its _target_, as in {path}._target_={base['_target_']}")
    if isinstance(base, Mapping) and isinstance(value, Mapping):
        target = value.get("_target_")
        signature = read_signature(target) if isinstance(target, str) else None
        for key in base.keys() & value.keys():
            known = signature.parameters.get(key) if signature else None
            matches = (
                signature.accepts(known.annotation, value[key])
                if signature and known and known.annotation is not None
                else None
            )
            if key not in HYDRA_KEYS and matches is None:
                _check_kinds(value[key], base[key], f"{path}.{key}" if path else key, root)
    elif (
        base is not None
        and not (isinstance(base, str) and ("${" in base or base in ("???", "auto")))
        and not _like(value, base)
    ):
        raise UserError(f"{path}={_shown(value)}: expected {_kind(base)}, as in {path}={_shown(base)}")


def _like(value: Any, base: Any) -> bool:
    if isinstance(base, Mapping):
        return value is None or isinstance(value, Mapping)
    if isinstance(base, list):
        return isinstance(value, list) and (
            not base or all(_like(one, base[0]) for one in value if base[0] is not None)
        )
    return bool(is_of_type(type(base).__name__, value))


def _kind(base: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return next((name for kind, name in names.items() if isinstance(base, kind)), "a node")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    text = "{...}" if isinstance(value, Mapping) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
