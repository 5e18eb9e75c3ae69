"""Gradients watched before every update: how large they are, and that they are finite."""

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
    """Skips an update whose gradients are not finite, on all ranks together, for they look after the gradients were averaged.

    folder: where EVIDENCE names the samples of the last skipped step.  patience: how many steps in a row may be skipped before
    NonFiniteError ends the training, its weights and its last checkpoint intact.
    norms: of the step's gradients, before clipping, by the name to record them under.  skipped: whether this step was.
    """

    def __init__(self, folder: Path, patience: int):
        self.folder, self.patience = folder, patience
        self.norms: dict[str, Tensor] = {}
        self.bad: list[str] = []
        self.row = 0

    @property
    def skipped(self) -> bool:
        return bool(self.bad)

    def on_train_batch_start(
        self, trainer: L.Trainer, lit: L.LightningModule, batch: dict[str, Any], batch_idx: int
    ) -> None:
        self.norms, self.bad = {}, []

    def on_before_optimizer_step(
        self, trainer: L.Trainer, lit: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm([p.grad for p in given if p.grad is not None])
        self.norms["grad_norm" if not self.norms else f"grad_norm_{len(self.norms) + 1}"] = norm
        if norm.isfinite():
            return
        names = {id(p): name for name, p in lit.named_parameters()}
        self.bad += [names[id(p)] for p in given if not total_norm([p.grad]).isfinite()]  # type: ignore[list-item]
        self.bad = self.bad or ["their norm overflows"]
        for p in given:
            p.grad = None  # nothing to learn from: the optimiser leaves weights and moments alone

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        if not self.skipped:
            self.row = 0
            return
        self.row += 1
        step = batch["step"] + 1
        keys = [
            key for rank in all_gather_objects(list(zip(batch["epoch"], batch["index"], strict=True))) for key in rank
        ]
        evidence = {"step": step, "skipped_in_a_row": self.row, "gradients": self.bad, "batch": {"epoch, index": keys}}
        if trainer.is_global_zero:
            atomic.write_json(self.folder / NONFINITE_REPORT, evidence)
        if self.row >= self.patience:
            raise NonFiniteError(
                f"the gradients of {self.row} steps in a row, up to step {step}, are not finite ({', '.join(self.bad[:2])}, ...); "
                f"the samples are named in {self.folder / NONFINITE_REPORT}, the weights from before are kept; "
                "lower the learning rate, or train in float32"
            )


def total_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients together, on the whole of those that are sharded."""
    return full_tensors(nn.utils.get_total_norm(grads))
