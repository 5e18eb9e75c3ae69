"""Steps made of several batches, for which memory has room where it has none for one."""

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
    """A stream of Slices, each cut into `parts` of equal length that follow one another."""

    stream: Any
    parts: int

    def __len__(self) -> int:
        return len(self.stream) * self.parts

    def __iter__(self) -> Iterator[BatchSlice]:
        for whole in self.stream:
            rows = len(whole.samples) // self.parts
            for low in range(0, rows * self.parts, rows):
                yield whole._replace(samples=whole.samples[low : low + rows], position=whole.position[low : low + rows])


class GradientAccumulation(L.Callback):
    """Shows callbacks whole steps of `parts` batches each: the start of the first, the end of the last with the mean of all outputs."""

    def __init__(self, callbacks: Iterable[L.Callback], parts: int):
        self.callbacks, self.parts = list(callbacks), parts
        self.outputs: list[dict[str, Tensor]] = []
        self.keys: dict[str, list[int]] = {"epoch": [], "index": []}

    def on_fit_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for one in self.callbacks:
            one.on_fit_start(trainer, lit)

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for one in self.callbacks:
            one.on_train_start(trainer, lit)

    def on_train_end(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for one in self.callbacks:
            one.on_train_end(trainer, lit)

    def on_train_batch_start(self, trainer: L.Trainer, lit: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.parts == 0:
            self.outputs, self.keys = [], {name: [] for name in self.keys}
            for one in self.callbacks:
                one.on_train_batch_start(trainer, lit, batch, batch_idx)
        for name, held in self.keys.items():
            held.extend(batch[name])

    def on_before_backward(self, trainer: L.Trainer, lit: L.LightningModule, loss: Tensor) -> None:
        for one in self.callbacks:
            one.on_before_backward(trainer, lit, loss)

    def on_after_backward(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        for one in self.callbacks:
            one.on_after_backward(trainer, lit)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, lit: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for one in self.callbacks:
            one.on_before_optimizer_step(trainer, lit, optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if lit.automatic_optimization:  # Lightning has divided the loss, and nothing else
            outputs = outputs | {"loss": outputs["loss"] * self.parts}
        self.outputs.append(outputs)
        if len(self.outputs) == self.parts:
            means = mean_terms(self.outputs)
            for one in self.callbacks:
                with profiler_of(trainer).profile(phase_of(one)):
                    one.on_train_batch_end(trainer, lit, means, {**batch, **self.keys}, batch_idx)


def mean_terms(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each term."""
    return {name: torch.stack([one[name] for one in terms]).mean(0) for name in terms[0]}
