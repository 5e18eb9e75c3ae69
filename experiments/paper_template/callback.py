"""The callback: how far a step moves the network."""

from typing import Any

import lightning
from torch import Tensor
from torch.nn.utils import get_total_norm


class UpdateRatio(lightning.Callback):
    """Log train/update_ratio, |change of the weights| / |weights| of a step, every `every` steps; often near 1e-3."""

    def __init__(self, every: int = 50):
        self.every = every
        self.before: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        if (trainer.global_step + 1) % self.every == 0:
            self.before = [p.detach().clone() for p in pl_module.model.denoiser.net.parameters()]

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.before and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            after = list(pl_module.model.denoiser.net.parameters())
            change = [new.detach() - old for new, old in zip(after, self.before, strict=True)]
            pl_module.log("train/update_ratio", get_total_norm(change) / get_total_norm(self.before))
            self.before = []
