"""The metrics of a run: metrics.jsonl while it trains, metrics.json at its end."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config.tree import map_leaves
from ldm.io import atomic
from ldm.io.parse import parse_json


class MetricsLog:
    """metrics.jsonl: a JSON object a line with step, wall (s since 1970) and the values, appended and flushed at once, never rewritten.

    resume: the step that a resumed run goes on from; rows of later steps, from before, no longer count.
    """

    def __init__(self, path: Path | str, resume: int | None = None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:  # the last writer was killed within a line
            self.file.write("\n")
        if resume is not None:
            self._append({"resume": resume, "wall": time.time()})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row; a number that is not finite becomes null."""
        self._append({"step": int(step), "wall": time.time(), **{key: _json(value) for key, value in values.items()}})

    def _append(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics_log(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a journal that count: those overtaken after a resume dropped, of two rows with the same step and keys the last."""
    rows: dict[tuple, dict[str, Any]] = {}
    if not Path(path).is_file():
        return []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:  # torn by a kill
            continue
        if "resume" in row:
            rows = {key: one for key, one in rows.items() if one["step"] <= row["resume"]}
        elif "step" in row:
            key = (row["step"], *sorted(row))
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


def write_final_metrics(folder: Path | str, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, the mark of a finished run."""
    atomic.write_json(Path(folder) / "metrics.json", map_leaves(metrics, _json))


def read_final_metrics(folder: Path | str) -> dict[str, Any] | None:
    """The final metrics of a finished run, None for one that is not."""
    file = Path(folder) / "metrics.json"
    return parse_json(file.read_text()) if file.is_file() else None


def _json(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
