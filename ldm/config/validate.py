"""Strict validation of a composed config against the signatures of its `_target_`s.

Signatures are read from source: nothing is imported and nothing runs.
"""

import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ldm.config.overrides import did_you_mean, format_choices
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


SEQUENCE_TYPES = ("tuple", "list", "Sequence", "Iterable", "Collection", "set", "frozenset")


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


@dataclass(frozen=True)
class Parameter:
    """One parameter of a target: its annotation as an expression, and whether it has no default."""

    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """The named parameters of a function or class.

    accepts_any: whether it also takes any other keyword.  aliases: type aliases defined in the module.
    """

    parameters: Mapping[str, Parameter]
    accepts_any: bool
    aliases: Mapping[str, ast.expr]

    def accepts(self, expected: ast.expr, value: Any) -> bool | None:
        """Return whether a plain value matches an annotation; None if that cannot be decided from source."""
        if isinstance(value, Mapping) and "_target_" in value:
            return None
        match expected:
            case ast.Constant(value=None):
                return value is None
            case ast.Constant(value=str(text)):
                return self.accepts(ast.parse(text, mode="eval").body, value)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return self.accepts(self.aliases[name], value) if name in self.aliases else _named(name, value)
            case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                return _any([self.accepts(left, value), self.accepts(right, value)])
            case ast.Subscript(value=ast.Name(id=name) | ast.Attribute(attr=name), slice=inner):
                return self._generic(name, inner.elts if isinstance(inner, ast.Tuple) else [inner], value)
        return None

    def _generic(self, name: str, inner: list[ast.expr], value: Any) -> bool | None:
        if name == "Optional":
            return _any([value is None, self.accepts(inner[0], value)])
        if name == "Union":
            return _any([self.accepts(option, value) for option in inner])
        if name == "Literal":
            return any(
                isinstance(option, ast.Constant) and type(option.value) is type(value) and option.value == value
                for option in inner
            )
        if name in ("dict", "Mapping"):
            return isinstance(value, Mapping)
        if name not in SEQUENCE_TYPES:
            return False if value is None else None
        if not isinstance(value, list | tuple):
            return False
        many = name != "tuple" or (isinstance(inner[-1], ast.Constant) and inner[-1].value is Ellipsis)
        if not many and len(value) != len(inner):
            return False
        verdicts = [self.accepts(inner[0] if many else inner[index], item) for index, item in enumerate(value)]
        return False if False in verdicts else None if None in verdicts else True


def _named(name: str, value: Any) -> bool | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    known = {
        "bool": isinstance(value, bool),
        "int": isinstance(value, int) and number,
        "float": number,
        "str": isinstance(value, str),
        "Path": isinstance(value, str),
        "None": value is None,
        "dict": isinstance(value, Mapping),
        "Mapping": isinstance(value, Mapping),
        **dict.fromkeys(SEQUENCE_TYPES, isinstance(value, list | tuple)),
    }
    # Any other name is a class or a type, which null is not an instance of.
    unknown = None if value is not None or name in ("Any", "object") else False
    return known.get(name, unknown)


def _any(verdicts: list[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


@cache
def read_signature(target: str) -> Signature | None:
    """Return the signature behind a dotted name, from its source; None for a library's name without readable source.

    Raises UserError with the closest name if ldm has no such function or class.
    """
    ours = target.split(".")[0] == "ldm"
    module, names = find_module(target)
    if module is None or not names:
        if ours:
            raise UserError(
                f"_target_={target}: {'a module, not a class or function' if module else 'no such module in ldm'}"
            )
        return None
    defined = _source(module).names
    if ours and names[0] not in defined:
        public = sorted(name for name in defined if not name.startswith("_"))
        raise UserError(
            f"_target_={target}: {module.name} has no {names[0]!r}"
            f"{did_you_mean(names[0], public)}{format_choices(public)}"
        )
    return _defined(module, names)


def find_module(target: str) -> tuple[Path | None, list[str]]:
    """Return the source file of the longest prefix of a dotted name that is a module, and the remaining names."""
    parts = target.split(".")
    spec = importlib.util.find_spec(parts[0])
    if spec is None:
        return None, parts
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None, parts[1:]
    folder, depth = Path(next(iter(spec.submodule_search_locations))), 1
    while depth < len(parts) and (folder / parts[depth]).is_dir():
        folder, depth = folder / parts[depth], depth + 1
    if depth < len(parts) and (folder / f"{parts[depth]}.py").is_file():
        return folder / f"{parts[depth]}.py", parts[depth + 1 :]
    file = folder / "__init__.py"
    return (file if file.is_file() and file.stat().st_size else None), parts[depth:]


@dataclass(frozen=True)
class ModuleSource:
    """The top level of a module: functions and classes, type aliases, and imported names as dotted targets."""

    definitions: Mapping[str, ast.FunctionDef | ast.ClassDef]
    aliases: Mapping[str, ast.expr]
    imports: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        return {
            *self.definitions,
            *self.aliases,
            *(name for name, origin in self.imports.items() if origin.startswith("ldm.")),
        }


@cache
def _source(file: Path) -> ModuleSource:
    definitions: dict[str, Any] = {}
    aliases: dict[str, ast.expr] = {}
    imports: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                definitions[name] = node
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                aliases[name] = value
            case ast.ImportFrom(module=str(origin), names=imported, level=0):
                imports |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in imported}
    return ModuleSource(definitions, aliases, imports)


def resolve_definition(target: str) -> str | None:
    """Return the name under which a function or class is defined, following its package's imports, or None."""
    module, names = find_module(target)
    if module is None or not names:
        return None
    source = _source(module)
    if names[0] in source.definitions:
        return target
    origin = source.imports.get(names[0], "")
    same = origin.split(".")[0] == target.split(".")[0] and origin != target
    return resolve_definition(".".join([origin, *names[1:]])) if same else None


def _defined(file: Path, names: list[str]) -> Signature | None:
    source = _source(file)
    node = source.definitions.get(names[0])
    if node is None:
        origin = source.imports.get(names[0])
        return (
            read_signature(".".join([origin, *names[1:]]))
            if origin and not origin.startswith(("typing.", "collections."))
            else None
        )
    for name in names[1:]:  # a classmethod used as constructor
        inner = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == name]
        if not inner:
            return None
        node = inner[0]
        return _function(node, source, bound=not _decorated(node, "staticmethod"))
    return _function(node, source) if isinstance(node, ast.FunctionDef) else _class(node, source)


def _class(node: ast.ClassDef, source: ModuleSource) -> Signature | None:
    init = next((child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"), None)
    if init is not None:
        return _function(init, source, bound=True)
    inherited = [_base(child, source) for child in node.bases]
    if not (
        _decorated(node, "dataclass")
        or any(isinstance(child, ast.Name) and child.id == "NamedTuple" for child in node.bases)
    ):
        return next((child for child in inherited if child), None)
    parameters = {name: one for base in reversed(inherited) if base for name, one in base.parameters.items()}
    for child in node.body:
        match child:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value) if (
                "ClassVar" not in ast.unparse(annotation)
            ):
                options = (
                    {part.arg: part.value for part in value.keywords}
                    if isinstance(value, ast.Call) and _called(value, "field")
                    else None
                )
                if options is not None and "init" in options and ast.unparse(options["init"]) == "False":
                    continue
                parameters[name] = Parameter(
                    annotation,
                    value is None if options is None else not {"default", "default_factory"} & options.keys(),
                )
    return Signature(parameters, False, source.aliases)


def _base(node: ast.expr, source: ModuleSource) -> Signature | None:
    if not isinstance(node, ast.Name):
        return None
    if isinstance(base := source.definitions.get(node.id), ast.ClassDef):
        return _class(base, source)
    origin = source.imports.get(node.id, "")
    return read_signature(origin) if origin.startswith("ldm.") else None


def _function(node: ast.FunctionDef, source: ModuleSource, bound: bool = False) -> Signature:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    optional = {arg.arg for arg in plain[len(plain) - len(arguments.defaults) :]} if arguments.defaults else set()
    optional |= {
        arg.arg for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is not None
    }
    named = [*plain[int(bound) :], *arguments.kwonlyargs]
    parameters = {arg.arg: Parameter(arg.annotation, arg.arg not in optional) for arg in named}
    return Signature(parameters, arguments.kwarg is not None, source.aliases)


def _decorated(node: ast.FunctionDef | ast.ClassDef, name: str) -> bool:
    return any(
        _called(decorator, name) if isinstance(decorator, ast.Call) else ast.unparse(decorator).endswith(name)
        for decorator in node.decorator_list
    )


def _called(node: ast.Call, name: str) -> bool:
    return ast.unparse(node.func).split(".")[-1] == name


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
    return bool(_named(type(base).__name__, value))


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


@cache
def is_user_code(package: str) -> bool:
    """Return whether a top-level package is ldm or the user's own, not an installed or standard library."""
    if package in sys.stdlib_module_names:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    location = spec.origin or next(iter(spec.submodule_search_locations or []), "")
    return bool(location) and not {"site-packages", "dist-packages"} & set(Path(location).parts)
