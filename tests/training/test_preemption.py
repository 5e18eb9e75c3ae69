"""A signal ends a training when its step is done and kept."""

import os
import signal

import lightning as L
import pytest
from rows import Line, Rows, train

from ldm.training.preemption import GracefulStop


class Told(L.Callback):
    """Sends this process signals after step 3."""

    def __init__(self, numbers):
        self.numbers = numbers

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        if batch["step"] == 2:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGTERM,), 85),
        ((signal.SIGUSR1,), 85),
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM, signal.SIGTERM), 85),  # the echo of a scheduler
    ],
)
def test_graceful_stop_saves_and_exits(numbers, code, capfd):
    signals = (signal.SIGTERM, signal.SIGINT)
    kept, before = [], list(map(signal.getsignal, signals))
    with pytest.raises(SystemExit) as end:
        train(Line(), Rows(), [Told(numbers), GracefulStop(lambda trainer, lit, step: kept.append(step))], steps=6)
    assert end.value.code == code
    assert kept == [3]
    assert "after step 3, which is saved: the same command goes on from there" in capfd.readouterr().err
    assert list(map(signal.getsignal, signals)) == before


class Left(L.Callback):
    """Leaves before the first step with this code, as Lightning does at a signal that is its own to answer."""

    def __init__(self, code):
        self.code = code

    def on_train_start(self, trainer, lit):
        raise SystemExit(self.code)


@pytest.mark.parametrize(("theirs", "ours"), [(None, 85), (143, 85), (1, 130), (3, 3)])
def test_lightning_exit_codes_are_translated(theirs, ours):
    with pytest.raises(SystemExit) as end:
        train(Line(), Rows(), [Left(theirs)], steps=2)
    assert end.value.code == ours


def test_lightning_sigterm_exit_code_is_known():
    """What it raises today is a SystemExit, and its code is one that is known."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    assert issubclass(SIGTERMException, SystemExit)
    assert SIGTERMException().code in (None, 143)
