"""Packages that only some options need: the extras of pyproject.toml."""

from collections.abc import Iterator
from contextlib import contextmanager

from ldm.errors import UserError


@contextmanager
def extra(name: str, use: str) -> Iterator[None]:
    """Import within the block what an extra of pyproject.toml installs.

    name: the extra, as `clip`.  use: what needs it, as it begins the message.
    Raises UserError with the command that installs it where a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(f"{use} needs the package {package}: pip install -e '.[{name}]'") from None
