"""What a drawn sample is to a person: a medium, a module that writes samples as files and shows several as one picture.

A data set names its medium (`medium = "sound"`, else image) and the data card stores the name. A name without a dot is
a module of this package, one with dots a module of one's own package.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "image"  # of a data set that names none


@dataclass(frozen=True)
class Medium:
    """The functions of a medium's module.

    write: (stem, sample (C, ...), metadata) -> the files of one sample, written as `files.write_sample` does; one of
    them is the picture stem.png, which holds the metadata. Its value `rate`, if there is one, is the data set's.
    sheet: (samples, columns) -> one picture (C, H, W) in [-1, 1] of all, C = 1, 3 or 4.
    fault: shape of a sample -> why samples of this shape cannot be shown, "" if they can.
    is_picture: whether the sheet shows all that there is of a sample, so that no other files are needed beside it.
    """

    name: str
    write: "Callable[[Path, Tensor, Mapping[str, str]], list[Path]]"
    sheet: "Callable[[Sequence[Tensor], int], Tensor]"
    fault: Callable[[Sequence[int]], str]
    is_picture: bool


def load_medium(name: str) -> Medium:
    """Import the module of a medium; `fault` and `IS_PICTURE` are optional in it.

    Raises UserError for a name that is no medium, and for one whose packages are not installed.
    """
    dotted = name if "." in name else f"ldm.media.{name}"
    module: Any = None
    try:
        module = import_module(dotted)
    except ModuleNotFoundError as error:
        if not f"{dotted}.".startswith(f"{error.name}."):
            raise
    if not all(callable(getattr(module, part, None)) for part in ("write", "sheet")):
        raise UserError(
            f"medium={name}: expected {', '.join(available_media())}, "
            "or the dotted name of a module of your own with the functions write and sheet"
        )
    fault = getattr(module, "fault", lambda shape: "")
    return Medium(name, module.write, module.sheet, fault, getattr(module, "IS_PICTURE", False))


def medium_of(data: Any) -> Medium:
    """Import the medium of a data set.  Raises as `load_medium` does."""
    return load_medium(getattr(data, "medium", DEFAULT))


def available_media() -> list[str]:
    """List the media of this package, without importing them."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in modules if "\ndef sheet(" in file.read_text(encoding="utf-8")]
