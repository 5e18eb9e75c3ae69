"""How long training steps take."""

import time

import lightning as L
import torch


class Clock(L.Callback):
    """seconds: of each step of the training, in order."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.since = 0.0

    def on_train_batch_start(self, trainer, lit, batch, batch_idx) -> None:
        self.since = now(lit.device)

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx) -> None:
        self.seconds.append(now(lit.device) - self.since)


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
