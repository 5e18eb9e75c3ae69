"""The options of a small command: key=value words, read by a function's signature, which is taken from its source; nothing is imported.

Each parameter stands on a line of its own, with the comment that --help shows.
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
    """One parameter: the source of its annotation and of its default (None where it must be given), and its comment."""

    kind: str
    default: str | None
    about: str

    @property
    def default_text(self) -> str:
        """The default as one would type it."""
        value = ast.literal_eval(self.default or "'...'")
        return "null" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def read(self, name: str, text: str) -> Any:
        """The value of a typed text. Raises UserError."""
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
    """What a function says of itself: its docstring, and its options in order."""

    about: str
    options: Mapping[str, Option]

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """The arguments that the words give. Raises UserError with the nearest name, or for one that is missing."""
        given: dict[str, Any] = {}
        for word in words:
            name, sign, text = word.partition("=")
            if not sign:
                raise UserError(f"{word!r} is not key=value (see --help)")
            if name not in self.options:
                raise UserError(
                    f"{word}: no key {name!r}{did_you_mean(name, self.options)}{format_choices(self.options)}"
                )
            if name in given:
                raise UserError(f"{name}= is given twice")
            given[name] = self.options[name].read(name, text)
        if missing := [name for name, option in self.options.items() if option.default is None and name not in given]:
            raise UserError(f"{missing[0]}=... must be given: {self.options[missing[0]].about or 'see --help'}")
        return given

    def describe(self) -> str:
        """The text of --help."""
        lines = [self.about.strip(), ""]
        for name, option in self.options.items():
            lines.append(f"  {f'{name}={option.default_text}':<28} {option.about}".rstrip())
        return "\n".join(lines)


def read_signature(file: Path, name: str) -> CommandSignature | None:
    """The signature of the function `name` that a module defines, None if it defines none."""
    source = file.read_text(encoding="utf-8")
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        return None
    lines, arguments = source.splitlines(), found[0].args
    defaults = [None] * (len(arguments.args) - len(arguments.defaults)) + [
        ast.unparse(one) for one in arguments.defaults
    ]
    options = {}
    for one, default in zip(arguments.args, defaults, strict=True):
        comment = re.search(r"#\s*(.*)", lines[one.lineno - 1])
        options[one.arg] = Option(
            ast.unparse(one.annotation) if one.annotation else "str", default, comment[1] if comment else ""
        )
    return CommandSignature(ast.get_docstring(found[0]) or "", options)


def choose(group: str, name: str, text: str, options: Collection[str]) -> str:
    """`text` if it is one of the options. Raises UserError with the nearest one."""
    if text not in options:
        raise UserError(f"{name}={text}: no such {group}{did_you_mean(text, options)}{format_choices(options)}")
    return text
