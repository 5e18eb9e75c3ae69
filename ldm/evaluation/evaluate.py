"""Samples drawn to be measured, and the measurement: who is asked for what, with which seeds, at which guidance."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.devices import resolve_precision
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.sampler import Sampler
from ldm.errors import ConfigError
from ldm.metrics.distribution import FrechetDistance, MetricSuite
from ldm.model import LatentDiffusion
from ldm.sampling.generate import generate_samples, rank_slice
from ldm.tensors import choose


@dataclass(frozen=True)
class EvaluationConfig:
    """How a model is scored: `num` samples in batches of batch_size, seeds from `seed` on, `steps` solver steps, classes in equal parts.

    guidances: the scales among which the lowest distance of guidance_num samples with seeds from guidance_seed on decides.
    precision: of the network while it draws: auto, 32 or bf16.
    every: steps of training between two scores of every_num samples, None for none before the end.
    """

    num: int = 5000
    batch_size: int = 250
    steps: int = 16
    seed: int = 1_000_000
    guidance_scales: Sequence[float] = (1.5, 2.0, 3.0)
    guidance_num: int = 1000
    guidance_seed: int = 2_000_000
    precision: str = "auto"
    eval_every: int | None = None
    eval_num: int = 1000

    def __post_init__(self):
        if (self.eval_every is not None and self.eval_every < 1) or self.eval_num < 2:
            raise ConfigError(
                f"training.score: eval_every={self.eval_every} eval_num={self.eval_num}: expected null or a step or more, and 2 or more"
            )


@dataclass(frozen=True)
class CaptionSource:
    """What each of num samples is told: a caption of class i mod K, the caption drawn with `seed`, for sample i."""

    classes: Sequence[str]
    captions: Sequence[Sequence[str]]
    seed: int = field(default=0)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """caption (list), label (B,) and index of the given samples."""
        label = [i % len(self.classes) for i in rows]
        caption = [choose(self.captions[k], self.seed, "told", i) for i, k in zip(rows, label, strict=True)]
        return {"caption": caption, "label": torch.tensor(label), "index": list(rows)}


def compute_scores(score: MetricSuite, drawn: Iterator[tuple[Tensor, dict[str, Any]]]) -> dict[str, float]:
    """Every metric of the drawn samples, over all processes."""
    score.reset()
    for image, batch in drawn:
        score.update(image, batch["label"], batch.get("caption"))
    return score.compute()


def evaluate(
    model: LatentDiffusion,
    protocol: EvaluationConfig,
    told: CaptionSource,
    make_score: Callable[[], MetricSuite],
    sampler: Sampler,
    guidance: Guidance,
    grid: Callable[..., Tensor] = trailing,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Choose the guidance scale by the distance alone, then take every number of make_score() at that scale, from other seeds."""
    score = make_score()
    distance = MetricSuite(score.net, score.reference, {"fd": FrechetDistance})
    ts = grid(model.denoiser.schedule, protocol.steps)
    draws = partial(
        generate_samples,
        model,
        told.batch,
        batch_size=protocol.batch_size,
        ts=ts,
        sampler=sampler,
        precision=protocol.precision,
    )
    tried: dict[str, float] = {}
    for scale in protocol.guidance_scales:
        drawn = draws(
            rank_slice(protocol.guidance_num), protocol.guidance_seed, guidance=partial(guidance, scale=scale)
        )
        tried[str(scale)] = frechet_distance(compute_scores(distance, drawn))
        say(f"guidance {scale}: distance {tried[str(scale)]:.2f} of {protocol.guidance_num} samples")
    scale = float(min(tried, key=lambda s: tried[s])) if tried else 1.0
    drawn = draws(rank_slice(protocol.num), protocol.seed, guidance=partial(guidance, scale=scale))
    values = compute_scores(score, drawn)
    how = {
        "guidance": scale,
        "guidance_tried": tried,
        "steps": protocol.steps,
        "arithmetic": resolve_precision(protocol.precision),
    }
    return values | how | {"seed": protocol.seed} | {f"score/{name}": value for name, value in score.provenance.items()}


def evaluate_during_training(
    model: LatentDiffusion,
    protocol: EvaluationConfig,
    told: CaptionSource,
    score: MetricSuite,
    sampler: Sampler,
    guidance: Guidance,
    grid: Callable[..., Tensor],
) -> dict[str, float]:
    """Every number of every_num samples at the first guidance scale, said with network and number: {"val/fd_fashion_1k": ...}."""
    scale = next(iter(protocol.guidance_scales), 1.0)
    ts, rows = grid(model.denoiser.schedule, protocol.steps), rank_slice(protocol.eval_num)
    part = partial(guidance, scale=scale)
    drawn = generate_samples(
        model, told.batch, rows, protocol.guidance_seed, protocol.batch_size, ts, sampler, part, protocol.precision
    )
    values = compute_scores(score, drawn)
    return {f"val/{name}_{format_count(int(values['n']))}": value for name, value in values.items() if name != "n"}


def format_count(n: int) -> str:
    """A number of samples as papers write it: 5k, 250."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)


def frechet_distance(values: dict[str, float]) -> float:
    """The Frechet distance among a Score's numbers."""
    return next(value for name, value in values.items() if name.startswith("fd_"))
