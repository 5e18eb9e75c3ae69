"""A table of results as a csv: one row a run or a point, numbers to six digits, written whole or not at all."""

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
    """A value as a cell: what reads back to it, floats to six significant digits."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"[{','.join(map(format_cell, value))}]" if isinstance(value, list | tuple) else str(value)


def parse_number(cell: Any) -> float | None:
    """The number that a cell holds, or None."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a csv, none where there is no file. Raises UserError for a row that is longer or shorter than the head."""
    if not path.is_file():
        return []
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    if broken := next((i for i, row in enumerate(rows, 2) if None in row or None in row.values()), None):
        raise UserError(
            f"{path}, line {broken}: not as many cells as the head has; take the file from git again, or remove it"
        )
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write rows under the columns of all of them, in the order in which they first come."""
    out = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({name: format_cell(value) for name, value in row.items()} for row in rows)
    atomic.write_text(path, out.getvalue())


def append(path: Path, row: Row) -> None:
    """Add a row to a csv that other processes may add to."""
    from filelock import FileLock

    lock = cache_dir() / "locks" / f"{identity.hash_config(str(path.absolute()))[:16]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        write(path, [*read(path), row])
