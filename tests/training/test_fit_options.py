"""What `fit` makes of its options: strategy, stream, callbacks, memory format; its trainer does not train."""

import signal
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rows import Line, Rows, train
from torch import nn

from ldm.data.stream import BatchStream
from ldm.errors import ConfigError, UserError
from ldm.training import fit as module
from ldm.training.accumulate import MicroBatchStream
from ldm.training.fit import fit, init_worker
from ldm.training.parallel import EveryGradient


class Shardable(Line):
    def configure_model(self):
        pass


class Manual(Line):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.fixture
def trainer(monkeypatch):
    """What the last trainer was made with, and what it was to train."""
    record = SimpleNamespace(end=None)

    class Trainer:
        def __init__(self, **options):
            vars(record).update(options)

        def fit(self, lit, loader):
            record.lit, record.loader, record.callbacks = lit, loader, self.callbacks
            if record.end is not None:
                raise record.end

    monkeypatch.setattr(L, "Trainer", Trainer)
    return record


def set_ranks(monkeypatch, rank, ranks):
    monkeypatch.setattr(module, "rank_and_world_size", lambda: (rank, ranks))


@pytest.mark.parametrize(
    ("lit", "ranks", "strategy", "expected"),
    [
        (Line, 1, "auto", str),
        (Line, 2, "auto", DDPStrategy),
        (Line, 1, "ddp", DDPStrategy),
        (Line, 1, "fsdp", str),
        (Line, 2, "fsdp", DDPStrategy),
        (Shardable, 1, "fsdp", ModelParallelStrategy),
        (Shardable, 2, "auto", DDPStrategy),
        (Shardable, 1, "auto", str),
    ],
)
def test_strategy_depends_on_ranks_and_on_what_can_be_sharded(lit, ranks, strategy, expected, trainer, monkeypatch):
    set_ranks(monkeypatch, 0, ranks)
    one = lit()
    fit(one, Rows(), [], batch_size=4, steps=1, strategy=strategy)
    assert isinstance(trainer.strategy, expected)
    assert (trainer.lit is one) == (expected is not ModelParallelStrategy)  # a copy is sharded


@pytest.mark.parametrize("rank", [0, 1])
def test_fallback_of_fsdp_is_printed_by_first_process(rank, trainer, monkeypatch, capfd):
    set_ranks(monkeypatch, rank, 2)
    fit(Line(), Rows(), [], batch_size=4, steps=1, strategy="fsdp")
    text = "trainer     strategy=fsdp shards diffusion models alone; Line is trained with strategy=ddp\n"
    assert capfd.readouterr().out == ("" if rank else text)


@pytest.mark.parametrize(
    ("strategy", "unused", "checked"), [("ddp", False, True), ("ddp", True, False), ("auto", False, False)]
)
def test_every_gradient_is_checked_where_ddp_does_not_search(strategy, unused, checked, trainer):
    lit, other = Line(), L.Callback()
    lit.has_unused_parameters = unused
    fit(lit, Rows(), [other], batch_size=4, steps=1, strategy=strategy)
    (group,) = trainer.callbacks
    assert [type(one) for one in group.callbacks] == [*([EveryGradient] if checked else []), L.Callback]
    assert group.callbacks[-1] is other


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("lit", [Line, Manual])
def test_accumulation_is_lightnings_or_the_modules_own(lit, parts, trainer):
    one = lit()
    fit(one, Rows(), [L.Callback()], batch_size=4, steps=1, accumulate_grad_batches=parts)
    assert trainer.accumulate_grad_batches == (parts if lit is Line else 1)
    assert getattr(one, "parts", None) == (None if lit is Line else parts)
    assert isinstance(trainer.loader.sampler, MicroBatchStream if parts > 1 else BatchStream)
    assert [group.parts for group in trainer.callbacks] == [parts]


def test_each_rank_has_its_slice_of_the_remaining_batches(trainer, monkeypatch):
    set_ranks(monkeypatch, 1, 2)
    fit(Line(), Rows(), [], batch_size=4, steps=7, start=3, seed=5)
    assert trainer.loader.sampler == BatchStream(16, 4, 7, 5, 3, 1, 2)


def test_batch_is_split_between_ranks_and_parts(trainer, monkeypatch):
    set_ranks(monkeypatch, 0, 2)
    fit(Line(), Rows(), [], batch_size=8, steps=1, accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match=r"batch_size=6 cannot be split into 4 equal parts \(2 processes"):
        fit(Line(), Rows(), [], batch_size=6, steps=1, accumulate_grad_batches=2)


def test_least_numbers_are_accepted_and_lower_ones_refused(trainer):
    fit(Line(), Rows(), [], batch_size=1, steps=1, num_nodes=1, num_workers=0, accumulate_grad_batches=1)
    for name, number in (("num_nodes", 0), ("batch_size", 0), ("num_workers", -1), ("accumulate_grad_batches", 0)):
        with pytest.raises(ConfigError, match=f"{name}={number}: expected {number + 1} or more"):
            fit(Line(), Rows(), [], **{"batch_size": 4, "steps": 1, name: number})


@pytest.mark.parametrize("compiled", [True, False])
def test_module_compiles_what_it_chooses(compiled, trainer, monkeypatch):
    lit, calls = Shardable(), []
    monkeypatch.setattr(lit, "compile", lambda: calls.append(True))
    fit(lit, Rows(), [], batch_size=4, steps=1, torch_compile=compiled)
    assert calls == [True] * compiled
    if compiled:
        with pytest.raises(ConfigError, match="torch_compile=true with strategy=fsdp"):
            fit(lit, Rows(), [], batch_size=4, steps=1, torch_compile=True, strategy="fsdp")


@pytest.mark.parametrize(
    ("precision", "strategy", "last"),
    [("32", "auto", True), ("64", "auto", False), ("32", "fsdp", False)],
)
def test_channels_are_last_except_in_float64_and_sharded(precision, strategy, last, trainer):
    lit = Shardable()
    lit.conv = nn.Conv2d(3, 2, 3)
    fit(lit, Rows(), [], batch_size=4, steps=1, precision=precision, strategy=strategy)
    assert lit.conv.weight.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (RuntimeError("DataLoader worker (pid 3)\nis killed"), UserError, "DataLoader worker (pid 3) is killed"),
        (RuntimeError("another"), RuntimeError, "another"),
    ],
)
def test_killed_worker_is_a_users_error_and_others_are_not(error, expected, text, trainer):
    trainer.end = error
    with pytest.raises(expected) as raised:
        train(Line(), Rows(), [], steps=1)
    assert text in str(raised.value)
    assert isinstance(raised.value, UserError) == (expected is UserError)


def test_workers_ignore_signals_and_end_with_their_parent(monkeypatch):
    calls = []
    monkeypatch.setattr(signal, "signal", lambda *call: calls.append(call))
    monkeypatch.setattr(module.compat, "exit_with_parent", lambda: calls.append("parent"))
    init_worker(0)
    assert calls == [(signal.SIGINT, signal.SIG_IGN), (signal.SIGUSR1, signal.SIG_IGN), "parent"]
