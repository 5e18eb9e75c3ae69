"""Gradient accumulation: steps made of several batches, where the memory is too small for one."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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


class GradientAccumulation(L.Callback):
    """Call callbacks once per step of `parts` batches.

    They get the start of the first batch, and the end of the last with the mean of all outputs and the keys of all
    rows.
    """

    def __init__(self, callbacks: Iterable[L.Callback], parts: int):
        self.callbacks, self.parts = list(callbacks), parts
        self.outputs: list[dict[str, Tensor]] = []
        self.keys: dict[str, list[int]] = {"epoch": [], "index": []}

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for callback in self.callbacks:
            callback.on_fit_start(trainer, lit)

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for callback in self.callbacks:
            callback.on_train_start(trainer, lit)

    def on_train_end(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for callback in self.callbacks:
            callback.on_train_end(trainer, lit)

    def on_train_batch_start(self, trainer: L.Trainer, lit: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.parts == 0:
            self.outputs, self.keys = [], {name: [] for name in self.keys}
            for callback in self.callbacks:
                callback.on_train_batch_start(trainer, lit, batch, batch_idx)
        for name, values in self.keys.items():
            values.extend(batch[name])

    def on_before_backward(self, trainer: L.Trainer, lit: L.LightningModule, loss: Tensor) -> None:
        for callback in self.callbacks:
            callback.on_before_backward(trainer, lit, loss)

    def on_after_backward(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for callback in self.callbacks:
            callback.on_after_backward(trainer, lit)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, lit: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for callback in self.callbacks:
            callback.on_before_optimizer_step(trainer, lit, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if lit.automatic_optimization:  # Lightning has divided the loss by parts, no other term
            outputs = outputs | {"loss": outputs["loss"] * self.parts}
        self.outputs.append(outputs)
        if len(self.outputs) == self.parts:
            means = mean_terms(self.outputs)
            for callback in self.callbacks:
                with profiler_of(trainer).profile(phase_of(callback)):
                    callback.on_train_batch_end(trainer, lit, means, {**batch, **self.keys}, batch_idx)


def mean_terms(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each term."""
    return {name: torch.stack([values[name] for values in terms]).mean(0) for name in terms[0]}
