"""Generation in batches: each row has its own seed, independent of batch size and rank."""

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
    """Return the contiguous block of range(num) that this rank processes; the blocks of all ranks partition it."""
    rank, ranks = rank_and_world_size()
    return range(num * rank // ranks, num * (rank + 1) // ranks)


def generate_samples(
    model: LatentDiffusion,
    make_batch: Callable[[Sequence[int]], dict[str, Any]],
    rows: Sequence[int],
    seed: int,
    batch_size: int,
    ts: Tensor,
    sampler: Sampler,
    guidance: Guidance,
    precision: str = "32",
    task: Task = generate,
    keep_conditions: Sequence[str] = (),
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Yield images (B, C, H, W) in [-1, 1] of the given rows with their batches, `batch_size` rows at a time.

    make_batch: rows -> the conditions and inputs of these rows.  seed: row i has the seed `seed + i`.  ts: descending
    grid (N + 1,).
    sampler, guidance, task: with their options bound.  precision: auto, 32 or bf16.
    keep_conditions: the conditions that guidance does not drop.
    """
    low = resolve_precision(precision) == "bf16"
    with fast_inference(model, torch.bfloat16 if low else torch.float32):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch, seeds = make_batch(part), [seed + i for i in part]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
                image = sample(model, batch, seeds, ts, sampler, guidance, task, keep_conditions)
            yield image.float(), batch
