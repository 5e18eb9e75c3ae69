"""Samples by row: each row has its own seed, whatever the batch size or rank."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.devices import rank_and_world_size, resolve_precision
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.sampler import Sampler
from ldm.model import LatentDiffusion
from ldm.net.inference import fast_inference
from ldm.sampling.tasks import Task, generate, sample


def rank_slice(num: int) -> range:
    """The samples of `num` that this process draws: a contiguous share, none drawn twice."""
    rank, ranks = rank_and_world_size()
    return range(num * rank // ranks, num * (rank + 1) // ranks)


def generate_samples(
    model: LatentDiffusion,
    told: Callable[[Sequence[int]], dict[str, Any]],
    rows: Sequence[int],
    seed: int,
    batch_size: int,
    ts: Tensor,
    sampler: Sampler,
    guidance: Guidance,
    precision: str = "32",
    task: Task = generate,
    hold: Sequence[str] = (),
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Images (B, C, H, W) in [-1, 1] of the given rows, row i with seed + i, and what they were told."""
    low = resolve_precision(precision) == "bf16"
    with fast_inference(model, torch.bfloat16 if low else torch.float32):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = told(part)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
                image = sample(model, batch, [seed + i for i in part], ts, sampler, guidance, task, hold)
            yield image.float(), batch
