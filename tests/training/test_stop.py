"""A signal ends a training when its step is done and kept."""

import os
import signal

import lightning as L
import pytest
from rows import Line, Rows, train

from ldm.training.stop import Stop


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
def test_a_training_that_is_told_to_stop(numbers, code, capfd):
    kept, before = [], signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train(Line(), Rows(), [Told(numbers), Stop(lambda trainer, lit, step: kept.append(step))], steps=6)
    assert end.value.code == code
    assert kept == [3]
    assert "after step 3, which is kept: the same command goes on from there" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
