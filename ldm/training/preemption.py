"""Signals: on all ranks a training ends after the same step, with a checkpoint."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import lightning as L
import torch

from ldm.training.parallel import all_reduce_max

# by signal: preempted, to be requeued; interrupted by Ctrl-C
EXIT_CODES = {signal.SIGTERM: 85, signal.SIGUSR1: 85, signal.SIGINT: 130}
# seconds within which a signal is a duplicate: a scheduler signals every process, and the launcher forwards it as well
DUPLICATE_SIGNAL_WINDOW = 2.0


class GracefulStop(L.Callback):
    """End a training on a signal: save a checkpoint after the step, then exit.

    The exit code is 85 on SIGTERM and SIGUSR1, 130 on Ctrl-C.  save: (trainer, lit, step) -> None.  The handler only
    sets a flag; ranks agree after every step, so that a signal to one of them ends all.  A second signal has its
    default effect: the process ends at once.
    """

    def __init__(self, save: Callable[[L.Trainer, L.LightningModule, int], None]):
        self.save = save
        self.code, self.since = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, lit: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            # replaces Lightning's handlers, which communicate with other ranks; Lightning restores the former ones
            for number in EXIT_CODES:
                signal.signal(number, self.handle_signal)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: set the flag at the first, end the process at the next."""
        if not self.code:
            self.code, self.since = EXIT_CODES[signal.Signals(number)], time.monotonic()
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that Ctrl-C ends even a process that waits for a rank
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
            reason = "preempted" if code == EXIT_CODES[signal.SIGTERM] else "interrupted"
            print(
                f"\n{reason} after step {step}, which is saved: the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(code)
