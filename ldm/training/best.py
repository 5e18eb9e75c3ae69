"""The checkpoint at which a metric was best (best.json), and the check that the metric is written at all."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint.step import complete_steps
from ldm.errors import UserError
from ldm.io import atomic

FILE = "best.json"  # beside the step folders
PACE = ("perf/images_per_s", "perf/data_wait", "perf/mfu")


@dataclass(frozen=True)
class Best:
    """The best checkpoint.

    metric: as keep_best names it, -name for the highest.  value: the number at `step`, negated for -name, so that lower
    is better.
    """

    metric: str
    step: int
    value: float


def signed(metric: str, value: float) -> float:
    """Return the value of a metric, negated if its name begins with -, so that lower is better."""
    return float(-value if metric.startswith("-") else value)


def read_best(folder: Path) -> Best | None:
    """Read best.json of a folder; None if it does not exist, is damaged, or names no metric."""
    try:
        best = Best(**json.loads((folder / FILE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return (
        best
        if isinstance(best.step, int) and isinstance(best.value, int | float) and math.isfinite(best.value)
        else None
    )


def lowest(metric: str, rows: Iterable[Mapping[str, Any]], steps: Collection[int]) -> Best | None:
    """Return the best of a journal's rows at some steps, the first of equals; None if none has a finite number."""
    name = metric.removeprefix("-")
    pairs = [
        (row["step"], row[name]) for row in rows if row["step"] in steps and isinstance(row.get(name), int | float)
    ]
    values = [Best(metric, step, signed(metric, value)) for step, value in pairs if math.isfinite(value)]
    return min(values, key=lambda best: (best.value, best.step), default=None)


def restore_best(folder: Path, metric: str, rows: Iterable[Mapping[str, Any]], until: int) -> Best | None:
    """Write best.json for `metric` from a journal's rows and the complete checkpoints up to step `until`.

    Removes it if there is no number, so that a run resumed with another metric is not compared with one of the former.
    """
    best = lowest(metric, rows, {step for step in complete_steps(folder) if step <= until})
    if best is not None:
        atomic.write_json(folder / FILE, asdict(best))
    else:
        (folder / FILE).unlink(missing_ok=True)
    return best


def require_metric(
    metric: str | None, scores: Collection[str] | None, why: str = "", callbacks: Mapping[str, Any] | None = None
) -> None:
    """Check that the training writes the number that keep_best names. Raises UserError if it does not.

    metric: the value of keep_best.  scores: the names val/... that it writes, None if unknown.  why: reason for none.
    callbacks: those of the config, which may write any number.
    """
    if callbacks:
        return
    name = (metric or "").removeprefix("-")
    group = name.partition("/")[0]
    if not name or group == "train" or name in PACE or (group == "val" and (scores is None or name in scores)):
        return
    listed = ", ".join(sorted(scores)) if scores else ""
    expected = f"one of {listed}" if listed else "train/loss, another train/... or one of " + ", ".join(PACE)
    reason = {
        "val": (not scores and why) or "the metrics of this config give no such number",
        "perf": "no such number is recorded",
    }
    problem = reason.get(group, "the numbers of metrics.jsonl begin with train/, val/ or perf/")
    raise UserError(f"keep_best={metric}: {problem}; expected {expected}")
