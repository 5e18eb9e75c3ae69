"""Callbacks around a training step: learning rate, weight average, metrics, progress, scores, sample grids."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm.ema import WeightAverage
from ldm.errors import NonFiniteError
from ldm.io.progress import ProgressBar
from ldm.training.accumulate import StepCallbacks
from ldm.training.gradients import GradientGuard
from ldm.training.parallel import all_reduce_mean
from ldm.training.profiler import peak_flops, profiler_of


class LearningRate(L.Callback):
    """Set every optimizer's rate before each step to its configured rate times schedule(step, total); without state."""

    def __init__(self, schedule: Callable[[int, int], float], total: int):
        self.schedule, self.total = schedule, total

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        factor = self.schedule(batch["step"], self.total)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * factor


class EMACallback(L.Callback):
    """Update a weight average after every step whose update of the weights was not skipped.

    gradients: skips updates.
    """

    phase = "EMA"

    def __init__(self, ema: WeightAverage, gradients: GradientGuard | None = None):
        self.ema, self.gradients = ema, gradients

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self.gradients is None or not self.gradients.has_skipped(self.ema.module):
            self.ema.update()


def find_average(trainer: L.Trainer) -> WeightAverage | None:
    """Return the average of the weights with which a training's model is scored and sampled, None without one."""
    groups = (group for group in trainer.callbacks if isinstance(group, StepCallbacks))  # type: ignore[attr-defined]
    averages = (one.ema for group in groups for one in group.callbacks if isinstance(one, EMACallback))
    return next(averages, None)


# the term that is a table (2, parts): sums of losses, and numbers of samples, in equal parts of t in [0, 1]
LOSS_BY_T = "loss_by_time"


class MetricsRecorder(L.Callback):
    """Write the mean of each term since the last record, over steps and ranks: write(step, {"train/loss": ...}).

    every: steps between two records.  gradients: measures their norms; the terms of a step that it skipped are left
    out, and "train/skipped" counts such steps.
    Of LOSS_BY_T, the mean loss in each part that has a sample is written: "train/loss/t=0.25-0.5".  Also written:
    "perf/images_per_s"; "perf/data_wait", the share of the time that this process waited for data; "perf/mfu", the
    FLOP/s as a share of the device's peak.
    Raises NonFiniteError, with the last checkpoint intact, if the loss is not finite though its gradients were.
    """

    phase = "logging"

    def __init__(
        self,
        write: Callable[[int, dict[str, float]], None],
        every: int,
        total: int,
        gradients: GradientGuard | None = None,
    ):
        self.write, self.every, self.total, self.gradients = write, every, total, gradients
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images, self.steps, self.skipped, self.since, self.waited = 0, 0, 0, time.monotonic(), 0.0

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        self.peak = peak_flops(str(trainer.precision), lit.device)
        self.since, self.waited = time.monotonic(), data_wait_seconds(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self.gradients is not None and self.gradients.skipped:
            self.skipped += 1
        else:
            for name, value in (outputs | (self.gradients.norms if self.gradients else {})).items():
                value = value.detach()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
                self.counts[name] = self.counts.get(name, 0) + 1
        self.images += batch["total"]
        self.steps += 1
        step = batch["step"] + 1
        if step % self.every == 0 or step == self.total:
            totals = {name: all_reduce_mean(total) for name, total in self.sums.items()}
            table = totals.pop(LOSS_BY_T, torch.zeros(2, 0))
            means = {f"train/{name}": float(total) / self.counts[name] for name, total in totals.items()}
            means |= {
                f"train/loss/t={part / len(table[0]):g}-{(part + 1) / len(table[0]):g}": float(total / number)
                for part, (total, number) in enumerate(table.T)
                if number
            }
            now = time.monotonic()
            means |= self.throughput(trainer, now - self.since)
            means["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
            if self.skipped:
                means["train/skipped"] = self.skipped
            self.sums, self.counts, self.images, self.steps, self.skipped = {}, {}, 0, 0, 0
            self.since, self.waited = now, data_wait_seconds(trainer)
            if not math.isfinite(means.get("train/loss", 0.0)):
                raise NonFiniteError(
                    f"the loss is not finite at step {step}; lower the learning rate, or train in float32"
                )
            if trainer.is_global_zero:
                self.write(step, means)

    def throughput(self, trainer: L.Trainer, seconds: float) -> dict[str, float]:
        """Return the perf/ numbers of the time since the last record."""
        values = {
            "perf/images_per_s": self.images / seconds,
            "perf/data_wait": (data_wait_seconds(trainer) - self.waited) / seconds,
        }
        flops = profiler_of(trainer).flops
        return values if flops is None else values | {"perf/mfu": flops * self.steps / seconds / self.peak}


def data_wait_seconds(trainer: L.Trainer) -> float:
    """Return the seconds that this process has waited for data so far."""
    return profiler_of(trainer).seconds["data"]


class Progress(L.Callback):
    """Show a progress bar with the step, the loss, the steps per second and an ETA."""

    phase = "logging"

    def __init__(self, name: str, start: int, total: int):
        self.name, self.start, self.total = name, start, total

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        self.bar = ProgressBar(self.name, self.total, self.start)

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self.bar.update(batch["step"] + 1, f"loss {float(outputs['loss']):.4g}  ")


class EvaluationCallback(L.Callback):
    """Write the numbers of measure(), called on all processes with the averaged weights, every `every` steps.

    total: a step at which they are written too, None for none.
    """

    def __init__(
        self,
        measure: Callable[[], dict[str, float]],
        write: Callable[[int, dict[str, float]], None],
        every: int,
        ema: WeightAverage,
        total: int | None = None,
    ):
        self.measure, self.write, self.every, self.ema, self.total = measure, write, every, ema, total

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        if step % self.every and step != self.total:
            return
        lit.eval()
        with self.ema.swapped_in():
            values = self.measure()
        lit.train()
        if trainer.is_global_zero:
            self.write(step, values)


class SampleGridCallback(L.Callback):
    """Call draw(step) every `every` steps in the main process, with the averaged weights if there is an average."""

    phase = "saving"

    def __init__(self, draw: Callable[[int], None], every: int, ema: WeightAverage | None = None):
        self.draw, self.every, self.ema = draw, every, ema

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        if step % self.every:
            return
        lit.eval()
        with self.ema.swapped_in() if self.ema else nullcontext():  # in all processes: each may have a shard
            if trainer.is_global_zero:
                self.draw(step)
        lit.train()
