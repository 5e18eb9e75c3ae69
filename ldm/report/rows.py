"""Tables of results as csv files: one row per run or point, numbers with six digits, written atomically."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.download import cache_dir
from ldm.runs import identity

Row = Mapping[str, Any]


def format_cell(value: Any) -> str:
    """Format a value as a cell that reads back to it; floats with six significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"[{','.join(map(format_cell, value))}]" if isinstance(value, list | tuple) else str(value)


def parse_number(cell: Any) -> float | None:
    """Parse a cell as a number; None if it is not one."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def read(path: Path) -> list[dict[str, str]]:
    """Read the rows of a csv; empty if there is no file.  Raises UserError for a row with too few or too many cells."""
    if not path.is_file():
        return []
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    if broken := next((i for i, row in enumerate(rows, 2) if None in row or None in row.values()), None):
        raise UserError(
            f"{path}, line {broken}: not as many cells as the header has; restore the file from git, or remove it"
        )
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows; the columns are those of all rows, in order of first appearance."""
    out = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: format_cell(value) for name, value in row.items()} for row in rows)
    atomic.write_text(path, out.getvalue())


def append(path: Path, row: Row) -> None:
    """Append a row to a csv that other processes may append to as well."""
    from filelock import FileLock

    lock = cache_dir() / "locks" / f"{identity.hash_config(str(path.absolute()))[:16]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        write(path, [*read(path), row])
