"""Parse key=value arguments of a small command against a function's signature, read from source without importing it.

Each parameter must be on a line of its own; its comment is what --help shows.
"""

import ast
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config.overrides import did_you_mean, format_choices
from ldm.errors import UserError

KINDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "str": ("text", str),
    "int": ("a whole number", int),
    "float": ("a number", float),
    "Sequence[float]": ("numbers such as 1,2,4", lambda text: [float(part) for part in text.split(",")]),
    "Sequence[str]": ("names such as a,b", lambda text: text.split(",")),
}


@dataclass(frozen=True)
class Option:
    """One parameter: source of its annotation and of its default (None if it is required), and its comment."""

    kind: str
    default: str | None
    about: str

    @property
    def default_text(self) -> str:
        """The default as a user would type it."""
        value = ast.literal_eval(self.default or "'...'")
        return "null" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def read(self, name: str, text: str) -> Any:
        """Convert typed text to the option's value.  Raises UserError."""
        if text == "null" and self.kind.endswith("| None"):
            return None
        expected, kind = KINDS[self.kind.removesuffix("| None").strip()]
        try:
            value = kind(text)
            if value != value:
                raise ValueError
            return value
        except ValueError:
            raise UserError(f"{name}={text}: expected {expected}") from None


@dataclass(frozen=True)
class CommandSignature:
    """A command's description (the function's docstring) and its options in order."""

    about: str
    options: Mapping[str, Option]

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """Parse key=value words into arguments.

        Raises UserError with the closest name for an unknown key, and for a repeated or missing one.
        """
        values: dict[str, Any] = {}
        for word in words:
            name, sign, text = word.partition("=")
            if not sign:
                raise UserError(f"{word!r} is not key=value (see --help)")
            if name not in self.options:
                raise UserError(
                    f"{word}: no key {name!r}{did_you_mean(name, self.options)}{format_choices(self.options)}"
                )
            if name in values:
                raise UserError(f"{name}= is given twice")
            values[name] = self.options[name].read(name, text)
        missing = [name for name, option in self.options.items() if option.default is None and name not in values]
        if missing:
            raise UserError(f"{missing[0]}=... must be given: {self.options[missing[0]].about or 'see --help'}")
        return values

    def describe(self) -> str:
        """Return the text of --help."""
        lines = [self.about.strip(), ""]
        for name, option in self.options.items():
            lines.append(f"  {f'{name}={option.default_text}':<28} {option.about}".rstrip())
        return "\n".join(lines)


def read_signature(file: Path, name: str) -> CommandSignature | None:
    """Return the signature of the top-level function `name` of a module, or None if there is none."""
    source = file.read_text(encoding="utf-8")
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not functions:
        return None
    lines, arguments = source.splitlines(), functions[0].args
    defaults: list[str | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    defaults += [ast.unparse(default) for default in arguments.defaults]
    options = {}
    for argument, default in zip(arguments.args, defaults, strict=True):
        comment = re.search(r"#\s*(.*)", lines[argument.lineno - 1])
        options[argument.arg] = Option(
            ast.unparse(argument.annotation) if argument.annotation else "str", default, comment[1] if comment else ""
        )
    return CommandSignature(ast.get_docstring(functions[0]) or "", options)


def choose(group: str, name: str, text: str, options: Collection[str]) -> str:
    """Return `text` if it is one of the options.  Raises UserError with the closest one otherwise."""
    if text not in options:
        raise UserError(f"{name}={text}: no such {group}{did_you_mean(text, options)}{format_choices(options)}")
    return text
