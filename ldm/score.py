"""Samples drawn to be measured, and the measurement: who is asked for what, with which seeds, at which guidance."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.adapter.prepared import prepared
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.sampler import Sampler
from ldm.diffusion.times import trailing
from ldm.errors import ConfigError
from ldm.metrics.distribution import FrechetDistance, Score
from ldm.model import LatentDiffusion
from ldm.task import Task, draw, generate
from ldm.tensors import choose
from ldm.training.fit import precision_here, world


@dataclass(frozen=True)
class Protocol:
    """How a model is scored: `num` samples in batches of batch_size, seeds from `seed` on, `steps` solver steps, classes in equal parts.

    guidances: the scales among which the lowest distance of guidance_num samples with seeds from guidance_seed on decides.
    precision: of the network while it draws: auto, 32 or bf16.
    every: steps of training between two scores of every_num samples, None for none before the end.
    """

    num: int = 5000
    batch_size: int = 250
    steps: int = 16
    seed: int = 1_000_000
    guidances: Sequence[float] = (1.5, 2.0, 3.0)
    guidance_num: int = 1000
    guidance_seed: int = 2_000_000
    precision: str = "auto"
    every: int | None = None
    every_num: int = 1000

    def __post_init__(self):
        if (self.every is not None and self.every < 1) or self.every_num < 2:
            raise ConfigError(
                f"training.score: every={self.every} every_num={self.every_num}: expected null or a step or more, and 2 or more"
            )


@dataclass(frozen=True)
class Told:
    """What each of num samples is told: a caption of class i mod K, the caption drawn with `seed`, for sample i."""

    classes: Sequence[str]
    captions: Sequence[Sequence[str]]
    seed: int = field(default=0)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """caption (list), label (B,) and index of the given samples."""
        label = [i % len(self.classes) for i in rows]
        caption = [choose(self.captions[k], self.seed, "told", i) for i, k in zip(rows, label, strict=True)]
        return {"caption": caption, "label": torch.tensor(label), "index": list(rows)}


def mine(num: int) -> range:
    """The samples of `num` that this process draws: a contiguous share, none drawn twice."""
    rank, ranks = world()
    return range(num * rank // ranks, num * (rank + 1) // ranks)


def samples(
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
    low = precision_here(precision) == "bf16"
    with prepared(model, torch.bfloat16 if low else torch.float32):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = told(part)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=low):
                image = draw(model, batch, [seed + i for i in part], ts, sampler, guidance, task, hold)
            yield image.float(), batch


def measure(score: Score, drawn: Iterator[tuple[Tensor, dict[str, Any]]]) -> dict[str, float]:
    """Every metric of the drawn samples, over all processes."""
    score.reset()
    for image, batch in drawn:
        score.update(image, batch["label"], batch.get("caption"))
    return score.compute()


def evaluate(
    model: LatentDiffusion,
    protocol: Protocol,
    told: Told,
    make_score: Callable[[], Score],
    sampler: Sampler,
    guidance: Guidance,
    grid: Callable[..., Tensor] = trailing,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Choose the guidance scale by the distance alone, then take every number of make_score() at that scale, from other seeds."""
    score = make_score()
    distance = Score(score.net, score.reference, {"fd": FrechetDistance})
    ts = grid(model.denoiser.schedule, protocol.steps)
    draws = partial(samples, model, told.batch, batch_size=protocol.batch_size, ts=ts, sampler=sampler, precision=protocol.precision)
    tried: dict[str, float] = {}
    for scale in protocol.guidances:
        drawn = draws(mine(protocol.guidance_num), protocol.guidance_seed, guidance=partial(guidance, scale=scale))
        tried[str(scale)] = frechet_of(measure(distance, drawn))
        say(f"guidance {scale}: distance {tried[str(scale)]:.2f} of {protocol.guidance_num} samples")
    scale = float(min(tried, key=lambda s: tried[s])) if tried else 1.0
    drawn = draws(mine(protocol.num), protocol.seed, guidance=partial(guidance, scale=scale))
    values = measure(score, drawn)
    how = {"guidance": scale, "guidance_tried": tried, "steps": protocol.steps, "arithmetic": precision_here(protocol.precision)}
    return values | how | {"seed": protocol.seed} | {f"score/{name}": value for name, value in score.provenance.items()}


def watch(
    model: LatentDiffusion, protocol: Protocol, told: Told, score: Score, sampler: Sampler, guidance: Guidance, grid: Callable[..., Tensor]
) -> dict[str, float]:
    """Every number of every_num samples at the first guidance scale, said with network and number: {"val/fd_fashion_1k": ...}."""
    scale = next(iter(protocol.guidances), 1.0)
    ts, rows = grid(model.denoiser.schedule, protocol.steps), mine(protocol.every_num)
    part = partial(guidance, scale=scale)
    drawn = samples(model, told.batch, rows, protocol.guidance_seed, protocol.batch_size, ts, sampler, part, protocol.precision)
    values = measure(score, drawn)
    return {f"val/{name}_{short(int(values['n']))}": value for name, value in values.items() if name != "n"}


def short(n: int) -> str:
    """A number of samples as papers write it: 5k, 250."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)


def frechet_of(values: dict[str, float]) -> float:
    """The Frechet distance among a Score's numbers."""
    return next(value for name, value in values.items() if name.startswith("fd_"))
