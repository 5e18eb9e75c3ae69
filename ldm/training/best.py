"""The checkpoint at which one number of a training was best, and whether that number will be written at all."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from ldm.checkpoint.step import complete_steps
from ldm.errors import UserError
from ldm.io import atomic

if TYPE_CHECKING:
    from ldm.training.callbacks import CheckpointCallback

FILE = "best.json"  # beside the step folders
PACE = ("perf/images_per_s", "perf/data_wait", "perf/mfu")


@dataclass(frozen=True)
class Best:
    """metric: as keep_best names it, -name for the highest.  value: its number at `step`, the sign turned for -name: lower is better."""

    metric: str
    step: int
    value: float


def signed(metric: str, value: float) -> float:
    """A number of which the lowest is best, of the value that `metric` names."""
    return float(-value if metric.startswith("-") else value)


def read_best(folder: Path) -> Best | None:
    """What best.json of a folder says; None without the file, or with one that is damaged or names no metric, as older runs wrote it."""
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
    """The best of a journal's rows at some steps, the first of equals; None where none of them has a finite number of that name."""
    name = metric.removeprefix("-")
    pairs = [
        (row["step"], row[name]) for row in rows if row["step"] in steps and isinstance(row.get(name), int | float)
    ]
    values = [Best(metric, step, signed(metric, value)) for step, value in pairs if math.isfinite(value)]
    return min(values, key=lambda one: (one.value, one.step), default=None)


def restore_best(folder: Path, metric: str, rows: Iterable[Mapping[str, Any]], until: int) -> Best | None:
    """Write best.json again for `metric`, of a journal's rows and the complete checkpoints up to step `until`; remove it without any.

    So a run that is resumed with another metric is never compared with a number of the first.
    """
    best = lowest(metric, rows, {step for step in complete_steps(folder) if step <= until})
    if best is not None:
        atomic.write_json(folder / FILE, asdict(best))
    else:
        (folder / FILE).unlink(missing_ok=True)
    return best


def require_metric(metric: str | None, scores: Collection[str] | None, why: str = "") -> None:
    """Raises UserError if the training never writes the number that keep_best names.

    scores: the names val/... that it writes, None where that cannot be known.  why: there are none.
    """
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


class BestLater(L.Callback):
    """Keeps the best by a number that is written after the checkpoint of its step, as those of pictures are."""

    phase = "saving"

    def __init__(self, checkpoints: "CheckpointCallback"):
        self.checkpoints = checkpoints

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.checkpoints.save_best(trainer, lit, batch["step"] + 1)
