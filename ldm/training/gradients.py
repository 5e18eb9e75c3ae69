"""Gradients checked before every update: their norm, and that they are finite."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ldm.checkpoint.dtensor import full_tensors
from ldm.errors import NonFiniteError
from ldm.io import atomic
from ldm.training.parallel import all_gather_objects

NONFINITE_REPORT = "nonfinite.json"


class GradientGuard(L.Callback):
    """Skip an update whose gradients are not finite, on all ranks alike, because they check averaged gradients.

    folder: where NONFINITE_REPORT names the samples of the last skipped step.  patience: number of consecutive skipped
    steps after which NonFiniteError ends the training, its weights and its last checkpoint intact.
    norms: of the step's gradients before clipping, by their name in the records.  skipped: whether this step was
    skipped.
    """

    def __init__(self, folder: Path, patience: int):
        self.folder, self.patience = folder, patience
        self.norms: dict[str, Tensor] = {}
        self.bad: list[str] = []
        self.idle: set[int] = set()  # ids of the parameters whose update was skipped in this step
        self.row = 0

    @property
    def skipped(self) -> bool:
        """Return whether the update of the current step was skipped."""
        return bool(self.bad)

    def has_skipped(self, module: nn.Module) -> bool:
        """Return whether the update of a module's parameters was skipped; one optimizer of two may skip alone."""
        return any(id(p) in self.idle for p in module.parameters())

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.norms, self.bad, self.idle = {}, [], set()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, lit: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in parameters if p.grad is not None])
        self.norms["grad_norm" if not self.norms else f"grad_norm_{len(self.norms) + 1}"] = norm
        if norm.isfinite():
            return
        names = {id(p): name for name, p in lit.named_parameters()}
        self.bad += [names[id(p)] for p in parameters if not total_norm([p.grad]).isfinite()]  # type: ignore[list-item]
        self.bad = self.bad or ["their norm overflows"]
        self.idle |= {id(p) for p in parameters}
        for p in parameters:
            p.grad = None  # so that the optimizer leaves weights and moments as they are

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if not self.skipped:
            self.row = 0
            return
        self.row += 1
        step = batch["step"] + 1
        keys = list(zip(batch["epoch"], batch["index"], strict=True))
        keys = [key for rank_keys in all_gather_objects(keys) for key in rank_keys]
        report = {"step": step, "skipped_in_a_row": self.row, "gradients": self.bad, "batch": {"epoch, index": keys}}
        if trainer.is_global_zero:
            atomic.write_json(self.folder / NONFINITE_REPORT, report)
        if self.row >= self.patience:
            raise NonFiniteError(
                f"the gradients of {self.row} steps in a row, up to step {step}, are not finite "
                f"({', '.join(self.bad[:2])}, ...); the samples are named in {self.folder / NONFINITE_REPORT}, "
                "the weights are those before these steps; "
                "lower the learning rate, or train in float32"
            )


def total_norm(grads: list[Tensor]) -> Tensor:
    """Compute the norm of all gradients together, unsharded."""
    return full_tensors(nn.utils.get_total_norm(grads))
