"""The held-out images of a diffusion model's training, and the callback that measures the loss on them."""

import re
from typing import Any

from ldm.config import build
from ldm.data.stream import length_of
from ldm.data.subset import Subset, choose_rows
from ldm.ema import WeightAverage
from ldm.errors import UserError
from ldm.recipes.run import TrainingRun
from ldm.runs.metrics_log import read_metrics_log
from ldm.training.callbacks import EvaluationCallback
from ldm.training.diffusion import LitDiffusion
from ldm.training.validation import HeldOutLoss, ValidationConfig

NAMES = re.compile(r"-?val/(loss|error|grad_norm)(_\d+)?")


def held_out_subset(cfg: Any, options: ValidationConfig) -> Subset | None:
    """Return the images on which the loss is measured, None for none. Raises UserError if the data hold out none."""
    if options.every is None:
        return None
    data = build.build_degraded_dataset(cfg, "test")
    if length_of(data) is None:
        raise UserError(
            f"training.validation.every={options.every}: the data's split test has no length, and {options.num} of its "
            "images are chosen; expected null, or data with a finite test split"
        )
    if not getattr(data, "held_out", len(data)):
        fraction = "data.test_fraction=0.1" if "test_fraction" in cfg.data else "other data"
        raise UserError(
            f"training.validation.every={options.every}: these data hold out no image; "
            f"expected null, or data of which some images are not trained on: {fraction}"
        )
    return Subset(data, choose_rows(len(data), options.num, options.seed))


def validation_metrics(metric: str | None, options: ValidationConfig, steps: int) -> set[str]:
    """Return the names of the numbers that the validation of a training writes.

    metric: the value of keep_best.  Raises UserError if that is such a number and is not written.
    """
    names = options.metric_names(steps)
    if metric and NAMES.fullmatch(metric) and metric.removeprefix("-") not in names:
        if options.every is None:
            raise UserError(f"keep_best={metric}: nothing is validated; expected training.validation.every=STEPS")
        norms = "" if options.grad_norms else ", or training.validation.grad_norms=true"
        last = options.levels - 1
        raise UserError(f"keep_best={metric}: expected a level of 0 to {last}, as in val/loss_{last}{norms}")
    return names


def validation_callback(
    options: ValidationConfig,
    run: TrainingRun,
    lit: LitDiffusion,
    ema: WeightAverage,
    subset: Subset,
    latents: Any,
    steps: int,
) -> EvaluationCallback:
    """Return the callback that writes the loss of the averaged weights every options.every steps and at the last.

    latents: the subset, with its moments or as it is.  steps: of the whole training.
    """
    if options.every is None:
        raise ValueError("every=None: expected a number of steps")
    chosen, total = len(subset), len(subset.dataset)
    run.print(f"validation  {chosen:,} of {total:,} held-out images, {options.levels} noise levels")
    precision = run.config["trainer"].get("precision", "auto")
    measure = HeldOutLoss(lit, latents, subset.rows, options, precision, run.print)
    return EvaluationCallback(measure, run.log_metrics, options.every, ema, steps)


def last_validation(run: TrainingRun, steps: int) -> dict[str, float]:
    """Return val/loss and val/error after the last step, as the main process has written them."""
    rows = read_metrics_log(run.folder / "metrics.jsonl") if run.is_main_process else []
    return {
        name: row[name] for row in rows if row.get("step") == steps for name in ("val/loss", "val/error") if name in row
    }
