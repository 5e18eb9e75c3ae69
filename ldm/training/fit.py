"""Lightning's trainer, run once over the remaining steps of a stream of batches."""

import logging
import os
import warnings
from collections.abc import Sequence
from functools import partial

import lightning as L
import torch
from torch.utils.data import DataLoader

from ldm.data.stream import Batched, Stream

PRECISION = {"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def precision_here(wanted: str | int) -> str:
    """`auto` resolved: bf16 where the hardware multiplies it fast (a recent GPU, a CPU with AMX), else 32."""
    if wanted != "auto":
        if str(wanted) not in PRECISION:
            raise ValueError(f"precision={wanted}: expected auto or one of {', '.join(PRECISION)}")
        return str(wanted)
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "32"


def world() -> tuple[int, int]:
    """(rank, number of processes) as the launcher says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


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
    workers: int = 0,
) -> None:
    """Train lit on steps start..steps-1, batch_size rows a step over all ranks together.

    Raises ValueError if the rows cannot be shared out equally.
    """
    rank, ranks = world()
    if batch_size % ranks:
        raise ValueError(f"batch_size={batch_size} cannot be split into {ranks} equal parts; choose a multiple of {ranks}")
    stream_of = getattr(dataset, "stream", partial(Stream, len(dataset)))  # a data set of several shapes has its own
    stream = stream_of(batch_size, steps, seed, start, rank, ranks)
    loader = DataLoader(Batched(dataset), sampler=stream, batch_size=None, num_workers=workers)
    if precision_here(precision) != "64":
        lit.to(memory_format=torch.channels_last)  # convolutions are faster so on CPUs and GPUs alike; the numbers are the same to rounding
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)  # its advice is for other ways of working
    warnings.filterwarnings("ignore", module="lightning")
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp_find_unused_parameters_true" if strategy == "ddp" or (strategy == "auto" and ranks > 1) else strategy,
        precision=PRECISION[precision_here(precision)],
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(lit, loader)
    except SystemExit as end:  # Lightning's answer to SIGTERM (without a code) and to Ctrl-C (1): neither is the end of the training
        raise SystemExit(130 if end.code else 143) from None
