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
    """Cross-entropy of net.logits, which takes uint8 images, against a batch's labels; its images are in [-1, 1].

    A net with several `heads`, {key of the batch: classes}, has their logits side by side; the losses are added.
    """

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
        heads = getattr(self.net, "heads", {"label": logits.shape[1]})
        losses, accuracies = [], {}
        for name, part in zip(heads, logits.split(list(heads.values()), 1), strict=True):
            losses.append(F.cross_entropy(part, batch[name], label_smoothing=self.label_smoothing))
            key = "accuracy" if name == "label" else f"accuracy_{name}"
            accuracies[key] = (part.argmax(1) == batch[name]).float().mean()
        return {"loss": torch.stack(losses).sum(), **accuracies}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile nothing: the network is small, and trained once."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())
