"""Evaluation of a model: the conditions, seeds and guidance scale of its samples, and their metrics."""

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
    """How a model is evaluated: on `num` samples in batches of batch_size, with seeds from `seed` on and `steps` solver
    steps.

    The classes are in equal proportions.
    guidance_scales: the candidates, of which the one with the lowest Frechet distance of guidance_num samples, with
    seeds from guidance_seed on, is used.
    precision: of the network while sampling: auto, 32 or bf16.
    eval_every: training steps between two evaluations on eval_num samples, None for none before the end.
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
                f"training.score: eval_every={self.eval_every} eval_num={self.eval_num}: "
                "expected null or a step or more, and 2 or more"
            )


@dataclass(frozen=True)
class CaptionSource:
    """The conditions of samples: sample i gets class i mod K and a caption of that class, chosen by `seed` and i.

    Without classes, captions are chosen from the one list of them; without captions, there is none.
    """

    classes: Sequence[str]
    captions: Sequence[Sequence[str]]
    seed: int = field(default=0)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Return index (list), and caption (list) and label (B,) int64 where there are any, of the given samples."""
        batch: dict[str, Any] = {"index": list(rows)}
        kinds = [i % max(1, len(self.classes)) for i in rows]
        if self.captions:
            batch["caption"] = [
                choose(self.captions[k], self.seed, "told", i) for i, k in zip(rows, kinds, strict=True)
            ]
        if self.classes:
            batch["label"] = torch.tensor(kinds)
        return batch


def compute_scores(metrics: MetricSuite, samples: Iterator[tuple[Tensor, dict[str, Any]]]) -> dict[str, float]:
    """Compute every metric of the samples, over all processes; samples: (images, batch) pairs of `generate_samples`."""
    metrics.reset()
    for image, batch in samples:
        metrics.update(image, batch.get("label", torch.zeros(len(image)).long()), batch.get("caption"))
    return metrics.compute()


def evaluate(
    model: LatentDiffusion,
    protocol: EvaluationConfig,
    conditions: CaptionSource,
    make_score: Callable[[], MetricSuite],
    sampler: Sampler,
    guidance: Guidance,
    grid: Callable[..., Tensor] = trailing,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Choose the guidance scale by the Frechet distance alone, then compute all metrics at that scale, from other
    seeds.

    grid: (schedule, steps) -> the sampler's times.  report: receives one line of text for each guidance scale.
    Returns the values, the guidance scales with their distances, the seed, and the metrics' provenance as
    `score/<key>`.
    """
    metrics = make_score()
    distance = MetricSuite(metrics.net, metrics.reference, {"fd": FrechetDistance})
    ts = grid(model.denoiser.schedule, protocol.steps)
    generate = partial(
        generate_samples,
        model,
        conditions.batch,
        batch_size=protocol.batch_size,
        ts=ts,
        sampler=sampler,
        precision=protocol.precision,
    )
    distances: dict[str, float] = {}
    for scale in protocol.guidance_scales:
        samples = generate(
            rank_slice(protocol.guidance_num), protocol.guidance_seed, guidance=partial(guidance, scale=scale)
        )
        distances[str(scale)] = frechet_distance(compute_scores(distance, samples))
        report(f"guidance {scale}: distance {distances[str(scale)]:.2f} of {protocol.guidance_num} samples")
    scale = float(min(distances, key=lambda s: distances[s])) if distances else 1.0
    samples = generate(rank_slice(protocol.num), protocol.seed, guidance=partial(guidance, scale=scale))
    values = compute_scores(metrics, samples)
    settings = {
        "guidance": scale,
        "guidance_tried": distances,
        "steps": protocol.steps,
        "arithmetic": resolve_precision(protocol.precision),
        "seed": protocol.seed,
    }
    return values | settings | {f"score/{name}": value for name, value in metrics.provenance.items()}


def evaluate_during_training(
    model: LatentDiffusion,
    protocol: EvaluationConfig,
    conditions: CaptionSource,
    metrics: MetricSuite,
    sampler: Sampler,
    guidance: Guidance,
    grid: Callable[..., Tensor],
) -> dict[str, float]:
    """Compute all metrics of eval_num samples at the first guidance scale, named as in {"val/fd_fashion_1k": ...}."""
    scale = next(iter(protocol.guidance_scales), 1.0)
    ts, rows = grid(model.denoiser.schedule, protocol.steps), rank_slice(protocol.eval_num)
    guided, seed = partial(guidance, scale=scale), protocol.guidance_seed
    samples = generate_samples(
        model, conditions.batch, rows, seed, protocol.batch_size, ts, sampler, guided, protocol.precision
    )
    values = compute_scores(metrics, samples)
    return {f"val/{name}_{format_count(int(values['n']))}": value for name, value in values.items() if name != "n"}


def format_count(n: int) -> str:
    """Format a number of samples as papers do: 5k, 250."""
    return f"{n // 1000}k" if n and n % 1000 == 0 else str(n)


def frechet_distance(values: dict[str, float]) -> float:
    """Return the Frechet distance among the values of a MetricSuite."""
    return next(value for name, value in values.items() if name.startswith("fd_"))
