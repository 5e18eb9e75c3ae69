"""Training with Lightning over the remaining steps of a stream of batches."""

import logging
import signal
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from ldm import compat
from ldm.data.stream import BatchDataset, make_stream
from ldm.devices import PRECISION, rank_and_world_size, resolve_precision
from ldm.errors import ConfigError, UserError
from ldm.training.accumulate import MicroBatchStream, StepCallbacks
from ldm.training.parallel import EveryGradient
from ldm.training.precision import Float16
from ldm.training.profiler import PhaseProfiler
from ldm.training.sharded import sharded_copy
from ldm.training.user_callbacks import RunLogger, UserCallbacks, arrange


def fit(
    lit: L.LightningModule,
    dataset,
    callbacks: Sequence[L.Callback],
    *,
    batch_size: int,
    steps: int,
    start: int = 0,
    seed: int = 0,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    precision: str | int = "auto",
    num_workers: int = 0,
    accumulate_grad_batches: int = 1,
    num_nodes: int = 1,
    timeout_minutes: float = 30.0,
    torch_compile: bool = False,
) -> None:
    """Train lit on steps start..steps-1, batch_size rows per step over all ranks together.

    callbacks: in the order of their calls, each by the step; those of a UserCallbacks by the batch.
    devices: per machine, of num_nodes machines.  accumulate_grad_batches: consecutive batches that make a step.
    timeout_minutes: minutes that a rank waits for the others before it gives up.
    torch_compile: whether to compile what lit.compile() compiles.
    strategy: fsdp shards modules that have configure_model; others are trained with ddp, which is printed.
    If lit.has_unused_parameters is false, every step must give every parameter a gradient, and DDP does not search for
    those without.
    Raises ConfigError if the rows cannot be shared out equally, or as check_device does; UserError if a process that
    reads data was killed.
    """
    rank, ranks = rank_and_world_size()
    for name, number, least in (
        ("num_workers", num_workers, 0),
        ("accumulate_grad_batches", accumulate_grad_batches, 1),
        ("num_nodes", num_nodes, 1),
        ("batch_size", batch_size, 1),
    ):
        if number < least:
            raise ConfigError(f"{name}={number}: expected {least} or more")
    if batch_size % (ranks * accumulate_grad_batches):
        parts = ranks * accumulate_grad_batches
        raise ConfigError(
            f"batch_size={batch_size} cannot be split into {parts} equal parts ({ranks} processes, "
            f"accumulate_grad_batches={accumulate_grad_batches}); choose a multiple of {parts}"
        )
    check_device(accelerator, strategy, precision)
    if torch_compile and strategy == "fsdp":
        raise ConfigError(
            "torch_compile=true with strategy=fsdp: expected one of the two; choose trainer=ddp, or torch_compile=false"
        )
    precision = resolve_precision(precision)
    if strategy == "fsdp" and not is_shardable(lit):
        strategy = "ddp" if ranks > 1 else "auto"
        if rank == 0:
            name = type(lit).__name__
            print(
                f"trainer     strategy=fsdp shards diffusion models alone; {name} is trained with strategy={strategy}",
                flush=True,
            )
    stream = make_stream(dataset)(batch_size, steps, seed, start, rank, ranks)
    if accumulate_grad_batches > 1:
        stream = MicroBatchStream(stream, accumulate_grad_batches)
    if not lit.automatic_optimization:
        cast(Any, lit).parts = accumulate_grad_batches
    loader = DataLoader(
        BatchDataset(dataset), sampler=stream, batch_size=None, num_workers=num_workers, worker_init_fn=init_worker
    )
    is_planar = all(p.ndim < 5 for p in lit.parameters())  # of 5 axes, this memory format is an error
    if is_planar and precision != "64" and strategy != "fsdp":  # FSDP2 takes contiguous weights only
        # faster convolutions on CPUs and GPUs; the results differ by rounding
        lit.to(memory_format=torch.channels_last)
    if torch_compile:
        lit.compile()
    strategy = "ddp" if strategy == "auto" and ranks > 1 else strategy
    unused = getattr(lit, "has_unused_parameters", True)  # modules of others need not have it
    if strategy == "ddp" and not unused:
        callbacks = [EveryGradient(), *callbacks]
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)  # its warnings do not apply to this loop
    warnings.filterwarnings("ignore", module="lightning")
    trainer: Any = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        accumulate_grad_batches=accumulate_grad_batches if lit.automatic_optimization else 1,
        strategy=make_strategy(strategy, timedelta(minutes=timeout_minutes), unused),
        precision=None if precision == "fp16" else PRECISION[precision],
        plugins=[Float16(device_type(accelerator))] if precision == "fp16" else None,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,  # what a callback logs is written at the step at which it logs
        use_distributed_sampler=False,
        profiler=PhaseProfiler(accumulate_grad_batches, grouped=StepCallbacks.state_key),
    )
    try:
        with sharded_copy(lit, callbacks) if strategy == "fsdp" else nullcontext((lit, callbacks)) as (module, hooks):
            trainer.callbacks = arrange(hooks, accumulate_grad_batches)
            for user in (one for one in hooks if isinstance(one, UserCallbacks)):
                done = partial(steps_done, trainer, start, accumulate_grad_batches)
                trainer.loggers = [RunLogger(user.write if rank == 0 else None, user.folder, done)]
                compat.set_logger_step(trainer, start + 1)  # the number of steps done at the end of the first
            trainer.fit(module, loader)
    except SystemExit as end:
        # before the first step Lightning exits with 1 on Ctrl-C, and with no code or, after 2.6, 143 on SIGTERM
        raise SystemExit({1: 130, None: 85, 143: 85}.get(cast(Any, end.code), end.code)) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        message = " ".join(str(error).split())
        remedy = "the same command goes on from the last checkpoint, lower trainer.num_workers if memory is short"
        raise UserError(f"a process that reads data is gone ({message}); {remedy}") from None


def steps_done(trainer: L.Trainer, start: int, parts: int) -> int:
    """Return the number of steps done by a trainer that began with step `start`, of `parts` batches each."""
    total: Any = trainer.fit_loop.epoch_loop.batch_progress.total  # its type has no `processed`
    return start + total.processed // parts


def check_device(accelerator: str, strategy: str, precision: str | int) -> None:
    """Check that this machine and the strategy have the device and the precision of a trainer.

    Raises ConfigError naming what is supported.
    """
    name = resolve_precision(precision)
    if accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ConfigError("accelerator=gpu: expected a GPU, and this machine has none; choose trainer=auto, or cpu")
    if strategy == "fsdp" and name in ("64", "fp16"):
        raise ConfigError(f"precision={name}: expected 32 or bf16 with strategy=fsdp; choose one, or trainer=ddp")


def device_type(accelerator: str) -> str:
    """Return the type of device on which Lightning trains with an `accelerator`: cuda, mps or cpu."""
    if accelerator == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def is_shardable(lit: L.LightningModule) -> bool:
    """Return whether a module defines in configure_model which of its parts FSDP shards, as Lightning requires."""
    return is_overridden("configure_model", lit)


def make_strategy(name: str, timeout: timedelta, unused: bool = True) -> Any:
    """Return Lightning's strategy of a name: DDP with a time-out, fsdp as FSDP2 over all processes, or another's name.

    unused: whether DDP searches the graph in every step for parameters on which the loss does not depend.
    Raises ConfigError for a name that Lightning does not know.
    """
    strategies = {
        "ddp": lambda: DDPStrategy(find_unused_parameters=unused, timeout=timeout),
        "fsdp": lambda: ModelParallelStrategy(
            data_parallel_size=rank_and_world_size()[1], tensor_parallel_size=1, timeout=timeout
        ),
    }
    if name in strategies:
        return strategies[name]()
    if name != "auto" and name not in StrategyRegistry.available_strategies():
        raise ConfigError(f"strategy={name!r}: expected auto, {', '.join(strategies)}, or one of Lightning's own names")
    return name


def init_worker(worker: int) -> None:
    """Let a process that reads data ignore signals, which the training process handles, and exit with that process."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    compat.exit_with_parent()
