"""Harm done to a training from within its own process, each at a step and on a rank; for smoke.processes(harm=...)."""

import os
import shutil
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import Any


def after_step(step: int, act: Callable[[], None], ranks: Collection[int], rank: int) -> None:
    """Call act() when training step `step` has been recorded, before anybody asks whether to stop."""
    from ldm.training.callbacks import MetricsRecorder

    record = MetricsRecorder.on_train_batch_end

    @wraps(record)
    def then(self, trainer, lit, outputs, batch, batch_idx):
        record(self, trainer, lit, outputs, batch, batch_idx)
        if batch["step"] + 1 == step and rank in ranks:
            act()

    MetricsRecorder.on_train_batch_end = then


def signals(numbers: Collection[int]) -> None:
    """Send this process signals, one after the other."""
    for number in numbers:
        os.kill(os.getpid(), number)


def not_a_number(steps: Collection[int], ranks: Collection[int], rank: int) -> None:
    """The loss of these steps is not a number, on these ranks."""
    from ldm.training.autoencoder import LitAutoencoder
    from ldm.training.diffusion import LitDiffusion

    for owner in (LitAutoencoder, LitDiffusion):
        _poison(owner, steps, rank in ranks)


def _poison(owner: Any, steps: Collection[int], here: bool) -> None:
    name = "adaptive_weight" if hasattr(owner, "adaptive_weight") else "sample_latent"
    whole = getattr(owner, name)
    step = owner.training_step

    def training_step(self, batch, batch_idx):
        self.poisoned = here and batch["step"] + 1 in steps
        return step(self, batch, batch_idx)

    def poisoned(self, *args):
        found = whole(self, *args)
        return found * float("nan") if self.poisoned else found

    owner.training_step = training_step
    setattr(owner, name, poisoned)


def full_disk(step: int, rank: int) -> None:
    """From the checkpoint of this step on, the disk has no room."""
    from ldm.training import checkpoints

    save = checkpoints.save_checkpoint

    def saved(folder, at, *args, **kwargs):
        if at >= step:
            shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
        return save(folder, at, *args, **kwargs)

    checkpoints.save_checkpoint = saved


def powerless(rank: int) -> None:
    """The process may write only where its owner may: the rights of root beyond that are given up (capset, Linux)."""
    import ctypes

    version_3, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(version_3, nothing) == 0


def end_readers() -> None:
    """Kill the processes that read data for this one, as the kernel does where memory runs out."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()


def killed_beside() -> None:
    """Write down the processes that read data for this one, then end it as the kernel would."""
    import multiprocessing
    import signal

    Path("readers.txt").write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    os.kill(os.getpid(), signal.SIGKILL)
