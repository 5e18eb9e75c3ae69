"""Process groups, ranks, and the precision that is fast on this hardware."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ldm import compat
from ldm.errors import ConfigError


@contextmanager
def process_group() -> Iterator[None]:
    """Set up a process group within the block if several processes were launched."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


PRECISION: dict[str, Any] = {"64": "64-true", "32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def resolve_precision(precision: str | int) -> str:
    """Resolve `auto`: bf16 if the hardware multiplies it fast (a recent GPU, a CPU with AMX), else 32.

    Raises ConfigError for an unknown precision.
    """
    if precision != "auto":
        if str(precision) not in PRECISION:
            raise ConfigError(f"precision={precision}: expected auto or one of {', '.join(PRECISION)}")
        return str(precision)
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "32"
    return "bf16" if compat.has_fast_bfloat16() else "32"


def rank_and_world_size() -> tuple[int, int]:
    """Return (rank, number of processes) from the environment of torch's launcher or of Slurm."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
