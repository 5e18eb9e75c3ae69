"""The callbacks of a config: what they log, their state in checkpoints, and what is refused."""

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint as LightningCheckpoint
from lightning.pytorch.loggers import Logger as LightningLogger

from ldm.checkpoint.dtensor import full_tensors
from ldm.checkpoint.state import trainable_parameters
from ldm.checkpoint.step import Checkpoint
from ldm.compat import set_global_step, set_logger_step, take_logged, tree_map
from ldm.errors import UserError
from ldm.training.accumulate import HOOKS, StepCallbacks, overrides
from ldm.training.profiler import profiler_of

RESERVED = ("step", "wall", "resume")  # keys of a row of metrics.jsonl that are no metrics
LOOPS = ("sanity_check", "validation", "test", "predict")  # of Lightning, none of which a training has


class UserCallbacks(L.Callback):
    """Stand for a config's callbacks among ldm's own: `fit` gives each to Lightning, at this place, by `arrange`.

    callbacks: by their key in the config.  write: (step, metrics) -> None, for what they and the module log.  folder:
    of the run.
    """

    def __init__(
        self,
        callbacks: Mapping[str, L.Callback],
        write: Callable[[int, Mapping[str, float]], None],
        folder: Path,
    ):
        self.callbacks, self.write, self.folder = dict(callbacks), write, folder

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        """Check that what a state is made of can be saved, before anything is computed."""
        self.state_dicts()

    def on_train_end(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        if trainer.should_stop and trainer.is_global_zero:
            done = trainer.logger.steps_done()  # type: ignore[union-attr]
            print(f"\ncallbacks   trainer.should_stop was set: the training ends after step {done}", flush=True)

    def state_dicts(self) -> dict[str, dict[str, Any]]:
        """Return the states of the callbacks that have one. Raises UserError for one that cannot be loaded again."""
        every = {name: one.state_dict() for name, one in self.callbacks.items()}
        states = {name: tree_map(full_tensors, state) for name, state in every.items() if state}
        for name, state in states.items():
            require_loadable(state, f"callbacks.{name}.state_dict()")
        return states

    def save(self, trainer: L.Trainer, lit: L.LightningModule) -> dict[str, Any]:
        """Return what a checkpoint has for the callbacks: Lightning's global_step, which counts the updates of every
        optimizer, the states, and what on_save_checkpoint added.

        Raises UserError for what cannot be loaded again.
        """
        if not self.callbacks:
            return {"global_step": trainer.global_step, "states": {}, "added": {}}
        with profiler_of(trainer).profile("callbacks"):
            states = self.state_dicts()
            optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
            contents = self.contents(trainer.global_step, trainable_parameters(lit), optimizers, states)
            known = frozenset(contents)
            for callback in self.callbacks.values():
                callback.on_save_checkpoint(trainer, lit, contents)
            added = {name: tree_map(full_tensors, value) for name, value in contents.items() if name not in known}
            require_loadable(added, "what on_save_checkpoint of a callback added")
        return {"global_step": trainer.global_step, "states": states, "added": added}

    def load(self, trainer: L.Trainer, lit: L.LightningModule, checkpoint: Checkpoint) -> None:
        """Restore global_step and the callbacks; print which of them have no state in the checkpoint, and the reverse.

        Of a checkpoint without any, from before there were callbacks, global_step is the number of steps.
        """
        saved = checkpoint.state.get("callbacks", {"global_step": checkpoint.step, "states": {}, "added": {}})
        states, step = saved["states"], saved["global_step"]
        set_global_step(trainer, step)
        with profiler_of(trainer).profile("callbacks"):
            for name, callback in self.callbacks.items():
                contents = self.contents(
                    step, checkpoint.tensors["model"], checkpoint.state["optimizers"], copy.deepcopy(states)
                )
                callback.on_load_checkpoint(trainer, lit, {**contents, **copy.deepcopy(saved["added"])})
                if name in states:
                    callback.load_state_dict(copy.deepcopy(states[name]))
        where = f"the checkpoint of step {checkpoint.step}"
        new = sorted(self.state_dicts().keys() - states.keys())  # in all processes, which may have to gather them
        lines = [f"callbacks.{name}: no state in {where}; it begins anew" for name in new]
        lines += [
            f"callbacks.{name}: its state in {where} is left out" for name in states if name not in self.callbacks
        ]
        if lines and trainer.is_global_zero:
            print("\n".join(lines), flush=True)

    @staticmethod
    def contents(global_step: int, weights: Any, optimizers: Any, states: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the hooks of a checkpoint are shown, by the keys of Lightning's; the callbacks' by their keys."""
        return {
            "epoch": 0,
            "global_step": global_step,
            "state_dict": dict(weights),
            "optimizer_states": list(optimizers),
            "callbacks": dict(states),
        }


class RunLogger(LightningLogger):
    """The logger of Lightning that writes to a run: metrics.jsonl, and the run's own loggers.

    write: (step, metrics) -> None, None in processes that do not write.  folder: of the run, also trainer.log_dir.
    steps_done: returns the number of steps done, for metrics that come without a step.
    """

    def __init__(
        self,
        write: Callable[[int, Mapping[str, float]], None] | None,
        folder: Path,
        steps_done: Callable[[], int],
    ):
        super().__init__()
        self.write, self.folder, self.steps_done = write, folder, steps_done

    @property
    def name(self) -> str:
        return "ldm"

    @property
    def version(self) -> str:
        return self.folder.name

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write numbers, or tensors of one number, of the state after `step` steps, by default of those done."""
        # Lightning adds its own epoch, an integer, to what it logs itself; a training is one, number 0
        values = {name: value for name, value in metrics.items() if not (name == "epoch" and type(value) is int)}
        values = {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
        if values and self.write is not None:
            self.write(self.steps_done() if step is None else int(step), checked_names(values))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the run's config is written at its start."""


class LoggedMetrics(L.Callback):
    """Write what `log` was given in a step of `parts` batches at its end: of each name the last value.

    write: (step, metrics) -> None.
    """

    phase = "logging"

    def __init__(self, write: Callable[[int, Mapping[str, float]], None], parts: int):
        self.write, self.parts = write, parts
        self.values: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.values |= take_logged(trainer)
        if (batch_idx + 1) % self.parts:
            if not lit.automatic_optimization:  # each batch of such a module is a step to Lightning's loggers
                set_logger_step(trainer, batch["step"])
            return
        values, self.values = self.values, {}
        if values and trainer.is_global_zero:
            self.write(batch["step"] + 1, checked_names(values))


def checked_names(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return metrics unless one has a name that metrics.jsonl uses itself; raise UserError for that."""
    if clash := [name for name in values if name in RESERVED]:
        raise UserError(f"log({clash[0]!r}): {', '.join(RESERVED)} are keys of metrics.jsonl; choose train/{clash[0]}")
    return values


def arrange(callbacks: Sequence[L.Callback], parts: int) -> list[L.Callback]:
    """Return the callbacks for Lightning: ldm's in groups called by the step, a config's between them by the batch."""
    arranged: list[L.Callback] = []
    group: list[L.Callback] = []
    for callback in callbacks:
        if isinstance(callback, UserCallbacks):
            logged = StepCallbacks([LoggedMetrics(callback.write, parts)], 1)  # of each batch
            arranged += [StepCallbacks(group, parts), *callback.callbacks.values(), logged]
            group = []
        group.append(callback)
    return [*arranged, StepCallbacks(group, parts)]


def require_callback(value: Any, where: str) -> L.Callback:
    """Return a value if it is a callback that a training can have. Raises UserError naming the key otherwise."""
    if not isinstance(value, L.Callback):
        kind = value.__name__ if isinstance(value, type) else type(value).__name__
        raise UserError(f"{where} gives {kind}: expected a subclass of lightning.Callback (import lightning)")
    if isinstance(value, LightningCheckpoint):
        raise UserError(
            f"{where}: ldm writes the checkpoints itself; leave it out, and see training.save_every, keep_last, "
            "keep_every and keep_best"
        )
    return value


def hooks_never_called(callback: L.Callback) -> list[str]:
    """Return the hooks that a callback has and no training calls, as it has no loop of Lightning but that of fit."""
    return [hook for hook in HOOKS if any(f"on_{loop}_" in hook for loop in LOOPS) and overrides(callback, hook)]


def require_loadable(value: Any, what: str) -> None:
    """Check that a value can be saved and loaded without running code. Raises UserError with the reason."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{what} cannot be in a checkpoint: expected tensors, numbers, text, and lists and dicts of them ({reason})"
        ) from None
