"""Callbacks of debug=: where numbers stop being finite, whether a network can overfit one batch, where time goes."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ldm.compat import tree_leaves
from ldm.errors import NonFiniteError, UserError
from ldm.training.profiler import profiler_of, synchronized_time, table


class NonFiniteDetector(L.Callback):
    """End a training by NonFiniteError at the first number that is not finite; name the module, loss or gradient.

    step: the only step that is checked, counted from 1, after which the training ends; None for all.  Raises UserError
    if the training begins after it.
    """

    def __init__(self, folder: Path, step: int | None = None):
        self.only, self.step, self.hooks = step, 0, list[Any]()

    @property
    def is_watched_step(self) -> bool:
        """Return whether the current step is checked."""
        return self.only in (None, self.step)

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for name, module in lit.named_modules():
            if name:
                self.hooks.append(module.register_forward_hook(self._named(name)))

    def _named(self, name: str) -> Any:
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if self.is_watched_step and not all_finite(output):  # submodules are checked before their parent
                inputs = "its input was finite" if all_finite(args) else "so was its input already"
                broken = [key for key, p in module.named_parameters() if not all_finite(p)]
                parameters = f", and its {', '.join(broken[:3])}" if broken else ""
                raise NonFiniteError(
                    f"step {self.step}: {name} ({type(module).__name__}) gives numbers that are not finite; "
                    f"{inputs}{parameters}"
                )

        return check

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.step = batch["step"] + 1
        if self.only is not None and self.only < self.step:
            raise UserError(
                f"debug.step={self.only}: this begins with step {self.step}; choose an earlier checkpoint by resume="
            )

    def on_before_backward(self, trainer: L.Trainer, lit: L.LightningModule, loss: Tensor) -> None:
        if self.is_watched_step and not all_finite(loss):
            raise NonFiniteError(f"step {self.step}: every module's answer is finite, the loss made of them is not")

    def on_after_backward(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for name, p in lit.named_parameters() if self.is_watched_step else ():
            if not all_finite(p.grad):
                raise NonFiniteError(f"step {self.step}: the loss is finite, its gradient by {name} is not")

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if self.only == self.step:
            if trainer.is_global_zero:
                print(f"\nstep {self.step}: every module's answer, the loss and its gradient are finite", flush=True)
            raise SystemExit(0)

    def on_train_end(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for hook in self.hooks:
            hook.remove()


class OverfitOneBatch(L.Callback):
    """Replace every step's batch, its noise and times included, by the first: a working network overfits it."""

    def __init__(self, folder: Path):
        self.first: dict[str, Any] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.first = self.first or dict(batch)
        batch.update({**self.first, "step": batch["step"]})


class Profile(L.Callback):
    """Write a profile to folder/profile: a trace of `traced` steps from `first_step` on, then a table of `steps` more.

    trace.json is for chrome://tracing.  table.txt has the time of a step by phase, then the torch operators that took
    longest in the traced steps.
    """

    def __init__(self, folder: Path, first_step: int = 3, traced: int = 3, steps: int = 20):
        self.folder = folder / "profile"
        self.first, self.timed = first_step, first_step + traced
        self.end = self.timed + steps
        self.trace: Any = None
        self.before: dict[str, float] = {}
        self.operators = ""
        self.step = 0  # steps since the start of this process

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.step += 1
        if not trainer.is_global_zero:
            return
        if self.step == self.timed:
            self.stop()
            profiler_of(trainer).clock = partial(synchronized_time, lit.device)
            self.before = profiler_of(trainer).elapsed()
        if self.step == self.end:
            self.write(trainer, self.end - self.timed)
        if self.step == self.first:
            self.trace = torch.profiler.profile(record_shapes=True)
            self.trace.start()

    def on_train_end(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        if trainer.is_global_zero and self.first <= self.step < self.end:  # the training was shorter
            self.stop()
            self.write(trainer, self.step + 1 - self.timed)

    def stop(self) -> None:
        """End the trace and write it, unless that was done."""
        if self.trace is None:
            return
        self.trace.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trace.export_chrome_trace(str(self.folder / "trace.json"))
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self.operators, self.trace = self.trace.key_averages().table(sort_by=by, row_limit=30), None

    def write(self, trainer: L.Trainer, steps: int) -> None:
        """Write the table of a number of steps and print it."""
        spent = {kind: seconds - self.before.get(kind, 0.0) for kind, seconds in profiler_of(trainer).elapsed().items()}
        text = table(spent, steps) if steps > 0 else "too few steps to time"
        (self.folder / "table.txt").write_text(f"{text}\n\n{self.operators}")
        print(f"\n{text}\nprofile     {self.folder / 'table.txt'}, {self.folder / 'trace.json'}", flush=True)


def all_finite(value: Any) -> bool:
    """Return whether every number in every tensor of nested data is finite."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
