"""The small classifier whose features score Fashion-MNIST samples; it is part of no loss."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.metrics.features import to_uint8


class LitEvaluator(L.LightningModule):
    """Cross-entropy training of net, whose `logits` takes uint8 images, on a batch's images in [-1, 1]."""

    net: Any
    has_unused_parameters = False

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.net, self.optimizer, self.label_smoothing = net, optimizer, label_smoothing

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        logits = self.net.logits(to_uint8(batch["image"])).float()
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch["label"]).float().mean()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is: it is small, and trained once."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())
