"""The metrics of a run: metrics.jsonl during training, metrics.json when it is finished."""

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
    """Append metrics to metrics.jsonl: one JSON object per line with step, wall (s since 1970) and the values.

    Lines are flushed at once and never rewritten.
    resume: the step at which a resumed run continues; existing rows of later steps are then ignored by readers.
    """

    def __init__(self, path: Path | str, resume: int | None = None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:  # the last writer was killed in the middle of a line
            self.file.write("\n")
        if resume is not None:
            self._append({"resume": resume, "wall": time.time()})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row; a non-finite number becomes null."""
        self._append({"step": int(step), "wall": time.time(), **{key: _json(value) for key, value in values.items()}})

    def _append(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics_log(path: Path | str) -> list[dict[str, Any]]:
    """Return the valid rows of a metrics log.

    Rows after the step of a later resume are dropped; of two rows with the same step and keys the last one counts.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    if not Path(path).is_file():
        return []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:  # incomplete line of a killed process
            continue
        if "resume" in row:
            rows = {key: old for key, old in rows.items() if old["step"] <= row["resume"]}
        elif "step" in row:
            key = (row["step"], *sorted(row))
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


def write_final_metrics(folder: Path | str, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, which marks a run as finished."""
    atomic.write_json(Path(folder) / "metrics.json", map_leaves(metrics, _json))


def read_final_metrics(folder: Path | str) -> dict[str, Any] | None:
    """Return the final metrics of a run, or None if it is not finished."""
    file = Path(folder) / "metrics.json"
    return parse_json(file.read_text()) if file.is_file() else None


def _json(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
