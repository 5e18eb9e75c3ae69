"""The training step of the evaluator, a small classifier whose features measure samples; it is part of no loss."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.io.images import to_uint8
from ldm.tensors import at_least_float32


class LitEvaluator(L.LightningModule):
    """Cross-entropy of net.logits, which takes uint8 images, against a batch's labels; its images are in [-1, 1]."""

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
        logits = self.net.logits(to_uint8(batch["image"]))
        logits = logits.to(at_least_float32(logits.dtype))
        loss = F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == batch["label"]).float().mean()}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile nothing: the network is small, and trained once."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())
