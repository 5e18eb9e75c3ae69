"""A signal ends a training when its step is done and kept."""

import os
import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from rows import Line, Rows, train

from ldm.training import preemption
from ldm.training.preemption import DUPLICATE_SIGNAL_WINDOW, GracefulStop


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
def test_graceful_stop_saves_and_exits(numbers, code, capfd, monkeypatch):
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: 0.0))  # both signals at once
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


def test_second_signal_after_the_window_of_duplicates_has_its_default_effect(monkeypatch):
    now, calls = [100.0], []
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(signal, "signal", lambda number, handler: calls.append((number, handler)))
    monkeypatch.setattr(signal, "raise_signal", lambda number: calls.append(number))
    stop = GracefulStop(None)
    stop.handle_signal(signal.SIGUSR1, None)
    assert (stop.code, calls) == (85, [(signal.SIGINT, signal.SIG_DFL)])
    now[0] += DUPLICATE_SIGNAL_WINDOW  # still one
    stop.handle_signal(signal.SIGINT, None)
    assert (stop.code, len(calls)) == (85, 1)
    now[0] += 0.5
    stop.handle_signal(signal.SIGINT, None)
    assert calls[1:] == [(signal.SIGINT, signal.SIG_DFL), signal.SIGINT]


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "preempted"), (signal.SIGINT, "interrupted")])
@pytest.mark.parametrize("chief", [True, False])
def test_signal_to_one_rank_ends_all_after_the_step(number, reason, chief, monkeypatch, capfd):
    """This rank got none; all ranks save and leave, and the first says why."""
    saved = []
    stop = GracefulStop(lambda trainer, lit, step: saved.append(step))
    trainer, lit = SimpleNamespace(is_global_zero=chief), SimpleNamespace(device=torch.device("cpu"))
    stop.on_train_batch_end(trainer, lit, None, {"step": 4}, 0)
    assert saved == []
    code = preemption.EXIT_CODES[number]
    monkeypatch.setattr(preemption, "all_reduce_max", lambda x: torch.maximum(x, torch.tensor(code)))
    with pytest.raises(SystemExit) as end:
        stop.on_train_batch_end(trainer, lit, None, {"step": 4}, 0)
    assert (end.value.code, saved) == (code, [5])
    assert capfd.readouterr().err.startswith(f"\n{reason} after step 5") == chief


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
