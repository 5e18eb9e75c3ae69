"""What happens around a training step: learning rate, weight average, records, pictures, checkpoints."""

import math
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm.checkpoint.dtensor import distribute_like, distribute_optimizer_state, full_tensors
from ldm.checkpoint.state import extra_state, load_trainable, trainable_parameters
from ldm.checkpoint.step import Checkpoint, prune_checkpoints, save_checkpoint
from ldm.ema import PowerEMA
from ldm.errors import ConfigError, NonFiniteError, UserError
from ldm.io import atomic
from ldm.io.progress import ProgressBar
from ldm.training.best import FILE, Best, read_best
from ldm.training.gradients import GradientGuard
from ldm.training.parallel import all_reduce_mean, chief_decides
from ldm.training.profiler import peak_flops, profiler_of


class LearningRate(L.Callback):
    """Sets every optimiser's rate before each step to its own rate times schedule(step, total): nothing to save, nothing to restore."""

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
    """Feeds a weight average after every step."""

    phase = "EMA"

    def __init__(self, ema: PowerEMA):
        self.ema = ema

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.ema.update(batch["step"] + 1)


LOSS_BY_T = "loss_by_time"  # the term that is a table: sums of losses and their numbers (2, parts), in equal parts of t in [0, 1]


class MetricsRecorder(L.Callback):
    """Writes the mean of each term since the last record, over steps and ranks, every `every` steps: write(step, {"train/loss": ...}).

    Of BY_TIME, the mean loss in each part that had any: "train/loss/t=0.25-0.5".  With them "perf/images_per_s"; "perf/data_wait", the part
    of the time that this process waited for data; "perf/mfu", the arithmetic of a step in the time it took, as a part of the device's peak.
    gradients: what saw their norm; the terms of a step that it skipped are left out, and `train/skipped` counts such steps.
    Raises NonFiniteError, with the last checkpoint intact, when the loss is not finite though its gradients were.
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
        """How fast it went since the last record."""
        found = {
            "perf/images_per_s": self.images / seconds,
            "perf/data_wait": (data_wait_seconds(trainer) - self.waited) / seconds,
        }
        flops = profiler_of(trainer).flops
        return found if flops is None else found | {"perf/mfu": flops * self.steps / seconds / self.peak}


def data_wait_seconds(trainer: L.Trainer) -> float:
    """Seconds that this process waited for data so far."""
    return profiler_of(trainer).seconds["data"]


class Progress(L.Callback):
    """Shows the step, the loss, the rate and an ETA."""

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


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay: the newest `last`, at least 2; every one whose step is a multiple of `every`; the best.

    value: the number of which the lowest is the best, if one was written since the last call; None to keep no best.
    metric: its name.  written: the names of all numbers written so far.
    """

    last: int = 2
    every: int | None = None
    value: Callable[[], float | None] | None = None
    metric: str = ""
    written: Callable[[], Collection[str]] = tuple


class CheckpointCallback(L.Callback):
    """Keeps step folders of a module's weights and extra state, its average and the optimisers; begins from `resume` if there is one.

    every: steps between two; a step at which the number of `keep` is best is saved too.  metadata: goes into the files of weights.
    The best one's metric, step and value are in best.json beside them; a number that is not finite is never the best.
    """

    phase = "saving"

    def __init__(
        self,
        folder: Path,
        ema: PowerEMA | None,
        every: int,
        total: int,
        config: str,
        resume: Checkpoint | None = None,
        metadata: dict[str, str] | None = None,
        keep: RetentionPolicy = RetentionPolicy(),
        averages: Mapping[str, PowerEMA] = MappingProxyType({}),
    ):
        self.keep, self.averages = keep, averages
        self.folder, self.ema, self.every, self.total, self.config, self.resume = (
            folder,
            ema,
            every,
            total,
            config,
            resume,
        )
        self.metadata = metadata
        self.saved = -1
        self.reported = False  # that the number which decides is missing

    def on_fit_start(
        self, trainer: L.Trainer, lit: L.LightningModule
    ) -> None:  # also called where no step is left to train
        if self.resume is None:
            return
        load_trainable(lit, self.resume.tensors["model"])
        for name, state in self.resume.state.get("extra", {}).items():
            lit.get_submodule(name).set_extra_state(state)
        if self.ema is not None:
            self.ema.load(
                {
                    name: distribute_like(value, self.ema.shadow[name])
                    for name, value in self.resume.tensors["ema"].items()
                }
            )
        for name, average in self.averages.items():
            if name not in self.resume.tensors:
                raise UserError(
                    f"training.snapshot_every: the checkpoint of step {self.resume.step} holds no {name}, so this run began without "
                    "snapshots; leave it null, or begin anew with resume=never"
                )
            average.load(
                {key: distribute_like(value, average.shadow[key]) for key, value in self.resume.tensors[name].items()}
            )
        trainer.precision_plugin.load_state_dict(self.resume.state.get("precision", {}))
        for optimizer, state in zip(trainer.optimizers, self.resume.state["optimizers"], strict=True):
            asked = [
                {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
            ]
            optimizer.load_state_dict(distribute_optimizer_state(state, optimizer))
            for group, options in zip(optimizer.param_groups, asked, strict=True):
                group.pop("base_lr", None)
                group.update(options)  # of its options the config decides, not the file

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        self.save_best(trainer, lit, step)
        if step % self.every == 0 or step == self.total:
            self.save(trainer, lit, step)
            group = self.keep.metric.removeprefix("-").partition("/")[0] + "/"
            if (
                trainer.is_global_zero
                and not self.reported
                and any(one.startswith(group) for one in self.keep.written())
            ):
                self.reported = True
                if problem := self.missing():
                    print(f"\n{problem} (up to step {step}): no best checkpoint so far", flush=True)

    def on_train_end(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        if self.saved < 0 or not trainer.is_global_zero or self.keep.value is None or self.best() is not None:
            return
        problem = self.missing() or f"keep_best={self.keep.metric}: the number was never finite"
        print(f"\n{problem}: there is no best checkpoint", flush=True)

    def missing(self) -> str:
        """In words, that the number which decides is not among those written, or nothing."""
        written = sorted(self.keep.written())
        if self.keep.value is None or self.keep.metric.removeprefix("-") in written:
            return ""
        return f"keep_best={self.keep.metric}: no such number was written, only {', '.join(written) or 'none'}"

    def save_best(self, trainer: L.Trainer, lit: L.LightningModule, step: int) -> None:
        """Keep the state after `step` steps if the number written since the last call is the best; the first process decides."""
        if self.keep.value is None:
            return
        value = self.keep.value() if trainer.is_global_zero else None
        better = value is not None and math.isfinite(value) and ((old := self.best()) is None or value < old.value)
        if not chief_decides(better, next(lit.parameters()).device):
            return
        self.save(trainer, lit, step)
        if value is not None and trainer.is_global_zero:  # once the checkpoint is there, and the former best still is
            atomic.write_json(self.folder / FILE, asdict(Best(self.keep.metric, step, value)))
            prune_checkpoints(self.folder, self.keep.last, self.protected_steps(step))

    def best(self) -> Best | None:
        """The best so far of the number that decides."""
        best = read_best(self.folder)
        return best if best is not None and best.metric == self.keep.metric else None

    def save(self, trainer: L.Trainer, lit: L.LightningModule, step: int) -> None:
        """Keep the state after `step` steps, unless that was done."""
        if step == self.saved:
            return
        self.saved = step
        tensors = {"model": trainable_parameters(lit)} | ({} if self.ema is None else {"ema": self.ema.shadow})
        tensors |= {name: average.shadow for name, average in self.averages.items()}
        state = {"optimizers": [o.state_dict() for o in trainer.optimizers], "extra": extra_state(lit)}
        state["precision"] = trainer.precision_plugin.state_dict()  # the scale of the loss in float16
        tensors, state = full_tensors(tensors), full_tensors(state)
        if trainer.is_global_zero:
            spared = self.protected_steps(step)
            save_checkpoint(self.folder, step, tensors, state, self.config, self.keep.last, self.metadata, spared)

    def protected_steps(self, step: int) -> Callable[[int], bool]:
        """Which older checkpoints stay beside that of `step`."""
        best = read_best(self.folder) if self.keep.value is None else self.best()
        return lambda old: (
            bool(self.keep.every and old % self.keep.every == 0) or (best is not None and old == best.step)
        )


class EvaluationCallback(L.Callback):
    """Writes measure()'s numbers every `every` steps, taken on all processes with the averaged weights in place."""

    def __init__(
        self,
        measure: Callable[[], dict[str, float]],
        write: Callable[[int, dict[str, float]], None],
        every: int,
        ema: PowerEMA,
    ):
        self.measure, self.write, self.every, self.ema = measure, write, every, ema

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        if step % self.every:
            return
        lit.eval()
        with self.ema.swapped_in():
            values = self.measure()
        lit.train()
        if trainer.is_global_zero:
            self.write(step, values)


class EMASnapshots(L.Callback):
    """Keeps averages of several lengths, by name, every `every` steps and at the last, for ldm.checkpoint.load to make another length of."""

    phase = "saving"

    def __init__(
        self,
        folder: Path,
        averages: Mapping[str, PowerEMA],
        every: int,
        total: int,
        metadata: dict[str, str] | None = None,
    ):
        if every < 1:
            raise ConfigError(f"training.snapshot_every={every}: expected a number of steps, or null")
        self.folder, self.averages, self.every, self.total, self.metadata = folder, averages, every, total, metadata

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        if step % self.every and step != self.total:
            return
        found = full_tensors({name: average.shadow for name, average in self.averages.items()})
        if trainer.is_global_zero:
            for name, tensors in found.items():
                atomic.write_tensors(self.folder / f"{name}-{step:08d}.safetensors", tensors, self.metadata)


class SampleGridCallback(L.Callback):
    """Calls draw(step) every `every` steps, with the averaged weights in place if there is an average."""

    phase = "saving"

    def __init__(self, draw: Callable[[int], None], every: int, ema: PowerEMA | None = None):
        self.draw, self.every, self.ema = draw, every, ema

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        if step % self.every:
            return
        lit.eval()
        with (
            self.ema.swapped_in() if self.ema else nullcontext()
        ):  # by all processes, each of which may have a shard of it
            if trainer.is_global_zero:
                self.draw(step)
        lit.train()
