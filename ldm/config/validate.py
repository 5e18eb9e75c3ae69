"""The strict check of a composed config against the signatures of its `_target_`s, read from source: nothing is imported, nothing runs."""

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


FORBIDDEN_NAMES = {  # a part of a dotted name that runs, reads or removes what the config's author pleases, wherever it is found
    *(
        "builtins",
        "ctypes",
        "importlib",
        "os",
        "pickle",
        "runpy",
        "shutil",
        "socket",
        "subprocess",
        "sys",
        "tempfile",
        "pathlib",
    ),
    *(
        "compile",
        "eval",
        "exec",
        "open",
        "system",
        "popen",
        "hub",
        "load",
        "load_url",
        "jit",
        "package",
        "cpp_extension",
        "serialization",
    ),
    *("_dynamo", "_inductor", "ops", "classes"),
}


FORBIDDEN_LDM_MODULES = ("cli", "config", "io", "launch", "runs")  # they write or download files, or start processes


SEQUENCE_TYPES = ("tuple", "list", "Sequence", "Iterable", "Collection", "set", "frozenset")


def validate(
    config: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    supplied: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Refuse a config that its `_target_`s could not take.

    config: resolved plain data.  base: the same choices without other overrides, unresolved; a value must be of the kind it has there.
    supplied: a node's dotted path, or a `_target_` -> the parameters that code passes, so that the config need not.
    Raises UserError with the key, the value and what was expected.
    """
    for path, node in iter_nodes(config):
        _node(path, node, {*(supplied or {}).get(path, ()), *(supplied or {}).get(str(node["_target_"]), ())})
    if base is not None:
        for key, value in base.items():
            if config.get(key) is None and isinstance(value, Mapping):
                raise UserError(f"{key}=null: a command needs one; leave it as it is, or choose another")
            if key not in config:
                raise UserError(f"~{key}: a command needs this key; leave it as it is")
        _check_kinds(config, base, "", base)


def _node(path: str, node: Mapping[str, Any], supplied: Collection[str]) -> None:
    target = node["_target_"]
    check_target_allowed(target, path)
    for name, kind, said in (
        ("_partial_", bool, "true or false"),
        ("_recursive_", bool, "true or false"),
        ("_args_", list, "a list"),
    ):
        if name in node and not isinstance(node[name], kind):
            raise UserError(f"{path}.{name}={_shown(node[name])}: expected {said}")
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
    if (
        node.get("_partial_") and not supplied
    ) or "_args_" in node:  # of a partial one only where it is known what code adds
        return
    missing = [
        name for name, one in signature.parameters.items() if one.required and name not in node and name not in supplied
    ]
    if missing:
        raise UserError(f"{path}: {target} also needs {', '.join(missing)}")


def check_target_allowed(target: Any, path: str = "") -> None:
    """Raises UserError unless target names something of ldm, of an installed library or of the person's own package, that may be called."""
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
            f"{where} is refused: a config may call ldm, a library or your own package, not what could run or remove anything"
        )
    try:
        found = importlib.util.find_spec(parts[0])
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise UserError(f"{where}: no package {parts[0]!r} here{did_you_mean(parts[0], ['ldm', 'torch'])}")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a target: annotation as source, and whether it has no default."""

    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """The named parameters of a function or class; open when it takes any others.  aliases: the module's own names for types."""

    parameters: Mapping[str, Parameter]
    accepts_any: bool
    aliases: Mapping[str, ast.expr]

    def accepts(self, expected: ast.expr, value: Any) -> bool | None:
        """Whether a plain value is what an annotation says; None where that cannot be told."""
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
            return _any([self.accepts(one, value) for one in inner])
        if name == "Literal":
            return any(
                isinstance(one, ast.Constant) and type(one.value) is type(value) and one.value == value for one in inner
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
        verdicts = [self.accepts(inner[0] if many else inner[place], one) for place, one in enumerate(value)]
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
    unknown = (
        None if value is not None or name in ("Any", "object") else False
    )  # a class or a type's name, which null is not
    return known.get(name, unknown)


def _any(verdicts: list[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


@cache
def read_signature(target: str) -> Signature | None:
    """The signature behind a dotted name, from its source; None for a library's name whose source does not tell.

    Raises UserError with the nearest name when ldm has no such thing.
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
            f"_target_={target}: {module.name} has no {names[0]!r}{did_you_mean(names[0], public)}{format_choices(public)}"
        )
    return _defined(module, names)


def find_module(target: str) -> tuple[Path | None, list[str]]:
    """The source file of the longest part of a dotted name that is a module, and the names that remain."""
    parts = target.split(".")
    spec = importlib.util.find_spec(parts[0])
    if spec is None:
        return None, parts
    if not spec.submodule_search_locations:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None, parts[1:]
    place, taken = Path(next(iter(spec.submodule_search_locations))), 1
    while taken < len(parts) and (place / parts[taken]).is_dir():
        place, taken = place / parts[taken], taken + 1
    if taken < len(parts) and (place / f"{parts[taken]}.py").is_file():
        return place / f"{parts[taken]}.py", parts[taken + 1 :]
    file = place / "__init__.py"
    return (file if file.is_file() and file.stat().st_size else None), parts[taken:]


@dataclass(frozen=True)
class ModuleSource:
    """What a module defines at its top: functions, classes, aliases of types, and names imported from elsewhere as dotted targets."""

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
            case ast.ImportFrom(module=str(origin), names=found, level=0):
                imports |= {one.asname or one.name: f"{origin}.{one.name}" for one in found}
    return ModuleSource(definitions, aliases, imports)


def resolve_definition(target: str) -> str | None:
    """The dotted name under which a function or class is defined, that or one that its package imports it from; None for anything else."""
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
    for name in names[1:]:  # a class's own constructor
        inner = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == name]
        if not inner:
            return None
        node = inner[0]
        return _function(node, source, bound=not _decorated(node, "staticmethod"))
    return _function(node, source) if isinstance(node, ast.FunctionDef) else _class(node, source)


def _class(node: ast.ClassDef, source: ModuleSource) -> Signature | None:
    init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    if init is not None:
        return _function(init, source, bound=True)
    inherited = [_base(one, source) for one in node.bases]
    if not (
        _decorated(node, "dataclass") or any(isinstance(one, ast.Name) and one.id == "NamedTuple" for one in node.bases)
    ):
        return next((one for one in inherited if one), None)
    parameters = {name: one for above in reversed(inherited) if above for name, one in above.parameters.items()}
    for one in node.body:
        match one:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value) if (
                "ClassVar" not in ast.unparse(annotation)
            ):
                made = (
                    {part.arg: part.value for part in value.keywords}
                    if isinstance(value, ast.Call) and _called(value, "field")
                    else None
                )
                if made is not None and "init" in made and ast.unparse(made["init"]) == "False":
                    continue
                parameters[name] = Parameter(
                    annotation, value is None if made is None else not {"default", "default_factory"} & made.keys()
                )
    return Signature(parameters, False, source.aliases)


def _base(node: ast.expr, source: ModuleSource) -> Signature | None:
    if not isinstance(node, ast.Name):
        return None
    if isinstance(above := source.definitions.get(node.id), ast.ClassDef):
        return _class(above, source)
    origin = source.imports.get(node.id, "")
    return read_signature(origin) if origin.startswith("ldm.") else None


def _function(node: ast.FunctionDef, source: ModuleSource, bound: bool = False) -> Signature:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    optional = {one.arg for one in plain[len(plain) - len(arguments.defaults) :]} if arguments.defaults else set()
    optional |= {
        one.arg for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is not None
    }
    named = [*plain[int(bound) :], *arguments.kwonlyargs]
    parameters = {one.arg: Parameter(one.annotation, one.arg not in optional) for one in named}
    return Signature(parameters, arguments.kwarg is not None, source.aliases)


def _decorated(node: ast.FunctionDef | ast.ClassDef, name: str) -> bool:
    return any(
        _called(one, name) if isinstance(one, ast.Call) else ast.unparse(one).endswith(name)
        for one in node.decorator_list
    )


def _called(node: ast.Call, name: str) -> bool:
    return ast.unparse(node.func).split(".")[-1] == name


def _check_kinds(value: Any, base: Any, path: str, root: Mapping[str, Any]) -> None:
    """Compare a node with its default: the same kind of value, where source does not say more; root: the whole that base is of."""
    named = re.fullmatch(r"\$\{([\w.]+)\}", base) if isinstance(base, str) else None
    if named:  # of what it refers to, whether that is a node is all that counts
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
            told = (
                signature.accepts(known.annotation, value[key])
                if signature and known and known.annotation is not None
                else None
            )
            if key not in HYDRA_KEYS and told is None:
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
    """Whether a top package is this one or a person's own, not an installed library or the standard one."""
    if package in sys.stdlib_module_names:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    place = spec.origin or next(iter(spec.submodule_search_locations or []), "")
    return bool(place) and not {"site-packages", "dist-packages"} & set(Path(place).parts)
