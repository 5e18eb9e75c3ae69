"""Signals: a training ends in order, at the end of a step, on all ranks at the same one."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import lightning as L
import torch

from ldm.training.parallel import all_reduce_max

EXIT_CODES = {signal.SIGTERM: 85, signal.SIGUSR1: 85, signal.SIGINT: 130}  # preempted, requeue me; Ctrl-C
DUPLICATE_SIGNAL_WINDOW = 2.0  # seconds within which the same signal is an echo: a scheduler tells every process, and our launcher passes it on once more


class GracefulStop(L.Callback):
    """Ends a training that was told to end: a checkpoint when its step is done, then exit code 85 (SIGTERM, SIGUSR1) or 130 (Ctrl-C).

    save: (trainer, lit, step) -> None.  The handler sets a flag and nothing else; ranks agree after every step, so that
    a signal to one of them ends all.  A second signal has the effect it has without us: out at once.
    """

    def __init__(self, save: Callable[[L.Trainer, L.LightningModule, int], None]):
        self.save = save
        self.code, self.since = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (
                EXIT_CODES
            ):  # over Lightning's, which talk to the other ranks from within; it puts the former ones back at its end
                signal.signal(number, self.handle_signal)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """The handler of a signal."""
        if not self.code:
            self.code, self.since = EXIT_CODES[signal.Signals(number)], time.monotonic()
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # Ctrl-C from here on ends even a process that waits for another rank
        elif time.monotonic() - self.since > DUPLICATE_SIGNAL_WINDOW:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def on_train_batch_end(
        self, trainer: L.Trainer, lit: L.LightningModule, outputs: object, batch: dict, batch_idx: int
    ) -> None:
        code = int(all_reduce_max(torch.tensor(self.code, device=lit.device)))
        if not code:
            return
        step = batch["step"] + 1
        self.save(trainer, lit, step)
        if trainer.is_global_zero:
            why = "preempted" if code == EXIT_CODES[signal.SIGTERM] else "interrupted"
            print(
                f"\n{why} after step {step}, which is kept: the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(code)
