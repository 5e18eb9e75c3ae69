"""Steps made of several batches, where the memory is too small for one, and the callbacks that are called by step."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import isfunction
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm.data.stream import BatchSlice
from ldm.training.profiler import phase_of, profiler_of


@dataclass(frozen=True)
class MicroBatchStream:
    """A stream of BatchSlices, each cut into `parts` consecutive ones of equal length."""

    stream: Any
    parts: int

    def __len__(self) -> int:
        return len(self.stream) * self.parts

    def __iter__(self) -> Iterator[BatchSlice]:
        for batch in self.stream:
            rows = len(batch.samples) // self.parts
            for low in range(0, rows * self.parts, rows):
                yield batch._replace(samples=batch.samples[low : low + rows], position=batch.position[low : low + rows])


class StepCallbacks(L.Callback):
    """Call ldm's own callbacks by the step: every hook that they override, in their order, timed as their phase.

    parts: batches of a step.  Of on_train_batch_start they get that of the first batch, and of on_train_batch_end that
    of the last, with the mean of all outputs and the keys of all rows; other hooks as often as Lightning calls them.
    """

    state_key = "ldm"

    def __init__(self, callbacks: Iterable[L.Callback], parts: int):
        self.callbacks, self.parts = list(callbacks), parts
        self.outputs: list[dict[str, Tensor]] = []
        self.keys: dict[str, list[int]] = {"epoch": [], "index": []}

    def on_train_batch_start(self, trainer: L.Trainer, lit: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.parts == 0:
            self.outputs, self.keys = [], {name: [] for name in self.keys}
            self.call("on_train_batch_start", trainer, lit, batch, batch_idx)
        if self.parts > 1:
            for name, values in self.keys.items():
                values.extend(batch[name])

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.parts > 1:
            if lit.automatic_optimization:  # Lightning has divided the loss by parts, no other term
                outputs = outputs | {"loss": outputs["loss"] * self.parts}
            self.outputs.append(outputs)
            if len(self.outputs) < self.parts:
                return
            outputs, batch = mean_terms(self.outputs), {**batch, **self.keys}
        self.call("on_train_batch_end", trainer, lit, outputs, batch, batch_idx)

    def call(self, hook: str, trainer: L.Trainer, lit: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Call a hook of each callback that overrides it."""
        for callback in self.callbacks:
            if overrides(callback, hook):
                kind = phase_of(callback)
                with nullcontext() if kind is None else profiler_of(trainer).profile(kind):
                    getattr(callback, hook)(trainer, lit, *args, **kwargs)


def overrides(callback: L.Callback, hook: str) -> bool:
    """Return whether a callback has a hook of its own, of its class or of the object."""
    return getattr(getattr(callback, hook), "__func__", None) is not getattr(L.Callback, hook)


def _forward(hook: str) -> Callable[..., None]:
    def call(self: StepCallbacks, trainer: L.Trainer, lit: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        self.call(hook, trainer, lit, *args, **kwargs)

    return call


HOOKS = tuple(
    name
    for name, value in vars(L.Callback).items()
    if isfunction(value) and not name.startswith("_") and name not in ("state_dict", "load_state_dict")
)
for _hook in HOOKS:
    if _hook not in vars(StepCallbacks):
        setattr(StepCallbacks, _hook, _forward(_hook))


def mean_terms(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each term."""
    return {name: torch.stack([values[name] for values in terms]).mean(0) for name in terms[0]}
