"""Training in float16: the loss is scaled, gradients are unscaled before any callback reads them."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from ldm import compat


class Float16(MixedPrecision):
    """Autocast to float16 with a scaled loss (Micikevicius et al. 2018, section 3.2), on a GPU or a CPU.

    Lightning's own leaves gradients scaled for optimizers that unscale in their step, as fused AdamW does: norms and
    clipping would depend on the scale, and a step without gradients fail.  Lightning replaces float16 by bfloat16 on
    CPUs.

    device: "cuda", "mps" or "cpu".
    """

    def __init__(self, device: str):
        super().__init__("16-mixed", device, torch.amp.GradScaler(device))

    def optimizer_step(  # type: ignore[override]
        self, optimizer: torch.optim.Optimizer, model: L.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Compute the gradients, unscale them, call the callbacks, and step unless a gradient is not finite."""

        def unscaled() -> Any:
            result = closure()
            if compat.unscales_itself(optimizer):
                self.scaler.unscale_(optimizer)  # type: ignore[union-attr]
            return result

        return super().optimizer_step(optimizer, model=model, closure=unscaled, **kwargs)
