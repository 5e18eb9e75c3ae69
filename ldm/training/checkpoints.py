"""Callbacks that write checkpoints: which of them stay, the best by a number, and averages for post-hoc lengths."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L

from ldm.checkpoint.dtensor import distribute_like, distribute_optimizer_state, full_tensors
from ldm.checkpoint.state import extra_state, load_trainable, trainable_parameters
from ldm.checkpoint.step import Checkpoint, prune_checkpoints, save_checkpoint
from ldm.ema import WeightAverage
from ldm.errors import ConfigError, UserError
from ldm.io import atomic
from ldm.training.best import FILE, Best, read_best
from ldm.training.parallel import chief_decides
from ldm.training.user_callbacks import UserCallbacks


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay: the newest `last`, at least 2; every one whose step is a multiple of `every`; the best.

    value: returns the number of which the lowest is the best, None if none was written since the last call; None
    instead of a function for no best.  metric: its name.  written: returns the names of all numbers written so far.
    """

    last: int = 2
    every: int | None = None
    value: Callable[[], float | None] | None = None
    metric: str = ""
    written: Callable[[], Collection[str]] = tuple


class CheckpointRestorer(L.Callback):
    """Restore a checkpoint before any other callback reads the state: weights, averages, optimizers and callbacks.

    ema, averages: as those of the CheckpointCallback that wrote it.  user: the callbacks of the config.
    Raises UserError if the checkpoint has other weights or averages.
    """

    phase = "saving"

    def __init__(
        self,
        checkpoint: Checkpoint,
        ema: WeightAverage | None,
        averages: Mapping[str, WeightAverage] = MappingProxyType({}),
        user: UserCallbacks | None = None,
    ):
        self.checkpoint, self.ema, self.averages, self.user = checkpoint, ema, averages, user

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        """Restore the checkpoint; Lightning calls this also if no step is left to train."""
        load_trainable(lit, self.checkpoint.tensors["model"])
        for name, state in self.checkpoint.state.get("extra", {}).items():
            lit.get_submodule(name).set_extra_state(state)
        if self.ema is not None:
            load_average(self.ema, self.checkpoint.tensors["ema"], self.checkpoint.state["updates"]["ema"])
        for name, average in self.averages.items():
            if name not in self.checkpoint.tensors:
                raise UserError(
                    f"training.snapshot_every: the checkpoint of step {self.checkpoint.step} has no {name}, so this "
                    "run began without snapshots; leave it null, or start again with resume=never"
                )
            load_average(average, self.checkpoint.tensors[name], self.checkpoint.state["updates"][name])
        trainer.precision_plugin.load_state_dict(self.checkpoint.state.get("precision", {}))
        for optimizer, state in zip(trainer.optimizers, self.checkpoint.state["optimizers"], strict=True):
            configured = [
                {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
            ]
            optimizer.load_state_dict(distribute_optimizer_state(state, optimizer))
            for group, options in zip(optimizer.param_groups, configured, strict=True):
                group.pop("base_lr", None)
                group.update(options)  # learning rate and other options are the config's, not the checkpoint's
        if self.user is not None:
            self.user.load(trainer, lit, self.checkpoint)


class CheckpointCallback(L.Callback):
    """Write step folders with weights, extra state, averages and optimizer states of a module, and states of callbacks.

    every: steps between two; a step at which the number of `keep` is best is saved too.  config: text of config.yaml.
    metadata: of the weights files.  averages: besides ema, by name.  user: the callbacks of the config.  best.json
    beside the step folders has metric, step and value of the best; a number that is not finite is never the best.
    """

    phase = "saving"

    def __init__(
        self,
        folder: Path,
        ema: WeightAverage | None,
        every: int,
        total: int,
        config: str,
        metadata: dict[str, str] | None = None,
        keep: RetentionPolicy = RetentionPolicy(),
        averages: Mapping[str, WeightAverage] = MappingProxyType({}),
        user: UserCallbacks | None = None,
    ):
        self.keep, self.averages, self.user = keep, averages, user
        self.folder, self.ema, self.every, self.total = folder, ema, every, total
        self.config, self.metadata = config, metadata
        self.saved = -1  # step of the last checkpoint
        self.reported = False  # whether a missing metric was reported

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
                and any(name.startswith(group) for name in self.keep.written())
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
        """Return a message if the number of `keep` is not among those written, else an empty text."""
        written = sorted(self.keep.written())
        if self.keep.value is None or self.keep.metric.removeprefix("-") in written:
            return ""
        return f"keep_best={self.keep.metric}: no such number was written, only {', '.join(written) or 'none'}"

    def save_best(self, trainer: L.Trainer, lit: L.LightningModule, step: int) -> None:
        """Save the state after `step` steps if the number written since the last call is the best so far.

        The first process decides for all.
        """
        if self.keep.value is None:
            return
        value = self.keep.value() if trainer.is_global_zero else None
        better = value is not None and math.isfinite(value) and ((old := self.best()) is None or value < old.value)
        if not chief_decides(better, next(lit.parameters()).device):
            return
        self.save(trainer, lit, step)
        if value is not None and trainer.is_global_zero:  # after the new checkpoint, before the former best is removed
            atomic.write_json(self.folder / FILE, asdict(Best(self.keep.metric, step, value)))
            prune_checkpoints(self.folder, self.keep.last, self.protected_steps(step))

    def best(self) -> Best | None:
        """Read the best so far of the number of `keep`."""
        best = read_best(self.folder)
        return best if best is not None and best.metric == self.keep.metric else None

    def save(self, trainer: L.Trainer, lit: L.LightningModule, step: int) -> None:
        """Save the state after `step` steps, unless it is saved already."""
        if step == self.saved:
            return
        self.saved = step
        averages = ({} if self.ema is None else {"ema": self.ema}) | dict(self.averages)
        tensors = {"model": trainable_parameters(lit)} | {name: one.shadow for name, one in averages.items()}
        state = {"optimizers": [o.state_dict() for o in trainer.optimizers], "extra": extra_state(lit)}
        state["updates"] = {name: one.updates for name, one in averages.items()}
        state["precision"] = trainer.precision_plugin.state_dict()  # loss scale in float16
        tensors, state = full_tensors(tensors), full_tensors(state)
        if self.user is not None:
            state["callbacks"] = self.user.save(trainer, lit)
        if trainer.is_global_zero:
            protected = self.protected_steps(step)
            save_checkpoint(self.folder, step, tensors, state, self.config, self.keep.last, self.metadata, protected)

    def protected_steps(self, step: int) -> Callable[[int], bool]:
        """Return a predicate: whether the checkpoint of an older step stays when that of `step` is written."""
        best = read_best(self.folder) if self.keep.value is None else self.best()
        return lambda old: (
            bool(self.keep.every and old % self.keep.every == 0) or (best is not None and old == best.step)
        )


def load_average(average: WeightAverage, tensors: Mapping[str, Any], updates: int) -> None:
    """Load a checkpoint's tensors, after so many updates, into an average, sharded as its own are."""
    average.load({name: distribute_like(value, average.shadow[name]) for name, value in tensors.items()}, updates)


class BestLater(L.Callback):
    """Save the best by a number that is written after the checkpoint's own turn, as those of sample grids are."""

    phase = "saving"

    def __init__(self, checkpoints: CheckpointCallback):
        self.checkpoints = checkpoints

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.checkpoints.save_best(trainer, lit, batch["step"] + 1)


class EMASnapshots(L.Callback):
    """Write averages of several lengths, by name, every `every` steps and at the last.

    ldm.checkpoint.load combines them to an average of any other length; the metadata have the number of updates, which
    is less than the step if any was skipped.  Raises ConfigError for every < 1.
    """

    phase = "saving"

    def __init__(
        self,
        folder: Path,
        averages: Mapping[str, WeightAverage],
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
        averages = full_tensors({name: average.shadow for name, average in self.averages.items()})
        if trainer.is_global_zero:
            for name, tensors in averages.items():
                metadata = {**(self.metadata or {}), "updates": str(self.averages[name].updates)}
                atomic.write_tensors(self.folder / f"{name}-{step:08d}.safetensors", tensors, metadata)
