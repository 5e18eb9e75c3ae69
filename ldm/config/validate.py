"""Strict validation of a composed config against the signatures of its `_target_`s."""

import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from ldm.config.overrides import did_you_mean
from ldm.config.signatures import is_of_type, read_signature
from ldm.config.tree import iter_nodes
from ldm.errors import UserError

HYDRA_KEYS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")


# Parts of a dotted name that could execute, read or delete whatever the config's author likes, at any position in it.
FORBIDDEN_NAMES = {
    *("builtins", "ctypes", "importlib", "os", "pathlib", "pickle", "runpy", "shutil", "socket", "subprocess", "sys"),
    *("tempfile", "compile", "eval", "exec", "open", "system", "popen", "hub", "load", "load_url", "jit", "package"),
    *("cpp_extension", "serialization", "_dynamo", "_inductor", "ops", "classes"),
}


# Packages of ldm that write files, download, or start processes.
FORBIDDEN_LDM_MODULES = ("cli", "config", "io", "launch", "runs")


def validate(
    config: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    supplied: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Check that every node of a config fits the signature of its `_target_`.

    config: resolved plain data.
    base: the config composed from the same group choices without other overrides, unresolved; each value must have the
        same kind as its value there.
    supplied: a node's dotted path, or a `_target_` -> the parameters that code passes, so that the config need not.
    Raises UserError with the key, the value and what was expected.
    """
    for path, node in iter_nodes(config):
        _node(path, node, {*(supplied or {}).get(path, ()), *(supplied or {}).get(str(node["_target_"]), ())})
    _check_callbacks(config.get("callbacks") or {})
    if base is not None:
        for key, value in base.items():
            if config.get(key) is None and isinstance(value, Mapping):
                raise UserError(f"{key}=null: the command needs this node; leave it out, or choose another option")
            if key not in config:
                raise UserError(f"~{key}: the command needs this key; leave it in")
        _check_kinds(config, base, "", base)


def _node(path: str, node: Mapping[str, Any], supplied: Collection[str]) -> None:
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
    # A partial node is complete only if it is known what code adds to it.
    if (node.get("_partial_") and not supplied) or "_args_" in node:
        return
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.required and name not in node and name not in supplied
    ]
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

    path: dotted path of the node, for the message.  Raises UserError otherwise.
    """
    where = f"{path}._target_={_shown(target)}"
    parts = target.split(".") if isinstance(target, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise UserError(f"{where}: expected package.module.name")
    ours = parts[0] == "ldm"
    tools = parts[0] in sys.stdlib_module_names or parts[0] in (
        "hydra",
        "hydra_plugins",
        "omegaconf",
        "yaml",
        "joblib",
        "dill",
        "cloudpickle",
    )
    if tools or (ours and parts[1] in FORBIDDEN_LDM_MODULES) or (not ours and FORBIDDEN_NAMES & set(parts)):
        raise UserError(
            f"{where} is refused: a config may call ldm, a library or your own package, "
            "but nothing that can run commands or delete files"
        )
    try:
        spec = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise UserError(f"{where}: package {parts[0]!r} is not installed{did_you_mean(parts[0], ['ldm', 'torch'])}")


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
