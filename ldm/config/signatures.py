"""Signatures of functions and classes by dotted name, read from their source: nothing is imported and nothing runs."""

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ldm.config.overrides import did_you_mean, format_choices
from ldm.errors import UserError

SEQUENCE_TYPES = ("tuple", "list", "Sequence", "Iterable", "Collection", "set", "frozenset")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a target: its annotation as an expression, whether it has no default, and whether it may be
    passed by position.
    """

    annotation: ast.expr | None
    required: bool
    positional: bool = True


@dataclass(frozen=True)
class Signature:
    """The named parameters of a function or class.

    accepts_any: whether it also takes any other keyword.  aliases: type aliases defined in the module.
    variadic: whether it takes any number of positional arguments.
    """

    parameters: Mapping[str, Parameter]
    accepts_any: bool
    aliases: Mapping[str, ast.expr]
    variadic: bool = False

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
                return self.accepts(self.aliases[name], value) if name in self.aliases else is_of_type(name, value)
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


def is_of_type(name: str, value: Any) -> bool | None:
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
    source = read_source(target)
    if ours and names[0] not in source.names:
        public = sorted(name for name in source.names if not name.startswith("_"))
        raise UserError(
            f"_target_={target}: {module.name} has no {names[0]!r}"
            f"{did_you_mean(names[0], public)}{format_choices(public)}"
        )
    return _defined(target, source, names)


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


def read_source(target: str) -> ModuleSource:
    """Return the top level of the module that a dotted name is in, which `find_module` must have found."""
    file, _ = find_module(target)
    return _source(file, package_of(target))  # type: ignore[arg-type]


def package_of(target: str) -> str:
    """Return the dotted name of the package of the module that a dotted name is in; empty for a top-level module."""
    file, names = find_module(target)
    module = target.split(".")[: -len(names) or None]
    return ".".join(module if file is not None and file.name == "__init__.py" else module[:-1])


@cache
def _source(file: Path, package: str) -> ModuleSource:
    """Read a module; package: its package's dotted name, from which relative imports start."""
    definitions: dict[str, Any] = {}
    aliases: dict[str, ast.expr] = {}
    imports: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                definitions[name] = node
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                aliases[name] = value
            case ast.Import(names=imported):
                imports |= {alias.asname: alias.name for alias in imported if alias.asname}
                imports |= {
                    alias.name.split(".")[0]: alias.name.split(".")[0] for alias in imported if not alias.asname
                }
            case ast.ImportFrom(names=imported):
                origin = imported_module(node, package)
                imports |= {alias.asname or alias.name: f"{origin}.{alias.name}" for alias in imported if origin}
    return ModuleSource(definitions, aliases, imports)


def imported_module(node: ast.ImportFrom, package: str) -> str | None:
    """Return the dotted name of the module that a statement in a module of `package` imports from.

    None for a relative import that leaves the top-level package.
    """
    if not node.level:
        return node.module
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])]) if all(above) and above else None


def resolve_definition(target: str) -> str | None:
    """Return the name under which a function or class is defined, following its package's imports, or None."""
    module, names = find_module(target)
    if module is None or not names:
        return None
    source = read_source(target)
    if names[0] in source.definitions:
        return target
    origin = imported_name(target, source, names)
    return resolve_definition(origin) if origin and origin.split(".")[0] == target.split(".")[0] else None


def imported_name(target: str, source: ModuleSource, names: list[str]) -> str | None:
    """Return the dotted name that a module's import gives to a target, None if the module does not import it.

    names: the part of the target after its module.
    """
    origin = source.imports.get(names[0])
    other = ".".join([origin, *names[1:]]) if origin else target
    return None if other == target else other


def _defined(target: str, source: ModuleSource, names: list[str]) -> Signature | None:
    node = source.definitions.get(names[0])
    if node is None:
        origin = imported_name(target, source, names)
        return read_signature(origin) if origin and not origin.startswith(("typing.", "collections.")) else None
    for name in names[1:]:  # a classmethod used as constructor
        inner = [child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == name]
        if not inner:
            return None
        node = inner[0]
        return _function(node, source, bound=not _decorated(node, "staticmethod"))
    return _function(node, source) if isinstance(node, ast.FunctionDef) else _class(node, source)


def _class(node: ast.ClassDef, source: ModuleSource) -> Signature | None:
    init = next((child for child in node.body if isinstance(child, ast.FunctionDef) and child.name == "__init__"), None)
    inherited = [_base(child, source) for child in node.bases]
    if init is not None:
        base = next((child for child in inherited if child), None)
        return _forwarded(init, _function(init, source, bound=True), base)
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


def _forwarded(init: ast.FunctionDef, signature: Signature, base: Signature | None) -> Signature:
    """Return the signature of a constructor with the parameters that its `**kwargs` passes on to the base class."""
    rest = init.args.kwarg.arg if init.args.kwarg else None
    for call in ast.walk(init) if rest and base else ():
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".__init__")):
            continue
        if not any(one.arg is None and ast.unparse(one.value) == rest for one in call.keywords):
            continue
        assert base is not None
        bound = ast.unparse(call.func).startswith("super(")
        passed = {*list(base.parameters)[: len(call.args) - (not bound)], *(one.arg for one in call.keywords)}
        parameters = {name: one for name, one in base.parameters.items() if name not in passed}
        aliases = {**base.aliases, **signature.aliases}
        return Signature({**parameters, **signature.parameters}, base.accepts_any, aliases, signature.variadic)
    return signature


def _base(node: ast.expr, source: ModuleSource) -> Signature | None:
    first, *rest = ast.unparse(node).split(".")
    if not rest and isinstance(base := source.definitions.get(first), ast.ClassDef):
        return _class(base, source)
    package = source.imports.get(first, "").split(".")[0]
    if package != "ldm" and not (package and is_user_code(package)):
        return None
    return read_signature(".".join([source.imports[first], *rest]))


def _function(node: ast.FunctionDef, source: ModuleSource, bound: bool = False) -> Signature:
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    optional = {arg.arg for arg in plain[len(plain) - len(arguments.defaults) :]} if arguments.defaults else set()
    optional |= {
        arg.arg for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is not None
    }
    named = [*plain[int(bound) :], *arguments.kwonlyargs]
    parameters = {arg.arg: Parameter(arg.annotation, arg.arg not in optional, arg in plain) for arg in named}
    return Signature(parameters, arguments.kwarg is not None, source.aliases, arguments.vararg is not None)


def _decorated(node: ast.FunctionDef | ast.ClassDef, name: str) -> bool:
    return any(
        _called(decorator, name) if isinstance(decorator, ast.Call) else ast.unparse(decorator).endswith(name)
        for decorator in node.decorator_list
    )


def _called(node: ast.Call, name: str) -> bool:
    return ast.unparse(node.func).split(".")[-1] == name


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
