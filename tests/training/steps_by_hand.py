"""Training steps in plain tensors, without autograd, and the same steps by the code: fit with a run's callbacks."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from recomputed import TOLERANCE, average_exponent, warm_cosine
from torch import Tensor

from ldm.data.stream import BatchStream
from ldm.ema import PowerEMA
from ldm.recipes.run import TrainingRun
from ldm.training.fit import fit
from ldm.training.loggers import NoLogger

BATCH, STEPS, WARMUP, END = 4, 3, 1, 0.1
LR, BETAS, DECAY, CLIP, SIGMA_REL = 0.02, (0.8, 0.9), 0.3, 0.25, 0.2
EPS = 0.01  # of AdamW; so large that a rounded gradient of almost 0 moves no weight by more than float32's tolerance
Tensors = dict[str, Tensor]


@dataclass
class Step:
    """What one training step leaves: mean terms, gradients before and after clipping, rate, weights and averages."""

    terms: dict[str, float]
    gradients: Tensors
    clipped: Tensors
    norm: float
    lr: float
    weights: Tensors
    average: Tensors


def rate(step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up times half a cosine from 1 to END."""
    return LR * warm_cosine(step, STEPS, WARMUP, END)


def micro_batches(data: Any, seed: int, accumulate: int, start: int = 0) -> list[list[dict[str, Any]]]:
    """Return the batches of each step, `accumulate` equal parts, with floating-point numbers in float64."""
    size, steps = BATCH // accumulate, []
    for step in range(start, STEPS):
        rows = BatchStream(len(data), BATCH, STEPS, seed).batch_at(step).samples
        parts = []
        for low in range(0, BATCH, size):
            batch = data.batch(rows[low : low + size])
            batch = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
            parts.append({**batch, "rows": rows[low : low + size], "position": list(range(low, low + size))})
        steps.append(parts)
    return steps


def train_by_hand(
    weights: Tensors,
    steps: Sequence[Sequence[dict[str, Any]]],
    gradients_of: Callable[[Tensors, dict[str, Any]], tuple[dict[str, Tensor], Tensors]],
    clip: float | None = CLIP,
    start: int = 0,
    is_decayed: Callable[[Tensor], bool] = lambda value: True,
    eps: float = EPS,
    averaged: str = "model.",
) -> list[Step]:
    """Take steps of AdamW on the trained weights, float64 by name.

    gradients_of: (all weights, batch) -> terms (B,) and the gradients of the mean of terms["loss"] by the trained ones.
    averaged: prefix of the names of the weights that are averaged.
    Loshchilov & Hutter 2019, algorithm 2; the rate of `rate`; the average of Karras et al. 2024, eq. 127.
    """
    current = {name: value.clone() for name, value in weights.items()}
    (b1, b2), exponent, m, v, result = BETAS, average_exponent(SIGMA_REL) + 1, {}, {}, []
    average: Tensors = {}
    for k, parts in enumerate(steps, start=1):
        computed = [gradients_of(current, part) for part in parts]
        names = list(computed[0][1])
        gradients = {name: sum(part[name] for _, part in computed) / len(parts) for name in names}
        terms = {
            name: sum(float(part[name].mean()) for part, _ in computed) / len(parts)
            for name in computed[0][0]
            if name != "t"
        }
        losses, t = (torch.cat([part[name] for part, _ in computed]) for name in ("loss", "t"))
        for quarter in range(4):
            inside = (t >= quarter / 4) & ((t < quarter / 4 + 0.25) | (quarter == 3))
            if inside.any():
                terms[f"loss/t={quarter / 4:g}-{quarter / 4 + 0.25:g}"] = float(losses[inside].mean())
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        clipped, lr = {name: factor * g for name, g in gradients.items()}, rate(start + k - 1)
        for name, g in clipped.items():
            m[name] = b1 * m.get(name, 0.0) + (1 - b1) * g
            v[name] = b2 * v.get(name, 0.0) + (1 - b2) * g**2
            update = (m[name] / (1 - b1**k)) / ((v[name] / (1 - b2**k)).sqrt() + eps)
            decay = DECAY if is_decayed(current[name]) else 0.0
            current[name] = current[name] - lr * decay * current[name] - lr * update
        after = {name: current[name] for name in names}
        beta = (1 - 1 / (start + k)) ** exponent
        for name in names:
            if name.startswith(averaged):
                average[name] = beta * average.get(name, weights[name]) + (1 - beta) * after[name]
        result.append(Step(terms, gradients, clipped, norm, lr, after, dict(average)))
    return result


@dataclass
class Recorder(L.Callback):
    """Record what each step leaves; stands last, after the callbacks of the run. rows: of MetricsRecorder, by step."""

    average: PowerEMA
    rows: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    gradients: Tensors = field(default_factory=dict)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.rows[step] = dict(values)

    def on_before_optimizer_step(self, trainer, lit, optimizer) -> None:
        self.gradients = {n: p.grad.clone() for n, p in lit.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx) -> None:
        trained = {n: p for n, p in lit.named_parameters() if p.requires_grad}
        row = {name.removeprefix("train/"): value for name, value in self.rows[batch["step"] + 1].items()}
        lr, norm = row.pop("lr"), row.pop("grad_norm")
        self.steps.append(
            Step(
                {name: value for name, value in row.items() if not name.startswith("perf/")},
                self.gradients,
                {n: p.grad.clone() for n, p in trained.items()},
                norm,
                lr,
                {n: p.detach().clone() for n, p in trained.items()},
                {f"model.{n}": value.clone() for n, value in self.average.shadow.items()},
            )
        )


def train(
    lit: L.LightningModule, average: PowerEMA, data: Any, folder: Any, precision: str, accumulate: int, start: int = 0
) -> list[Step]:
    """Train with fit and the callbacks of a run: rate, guard of gradients, average, records, checkpoints."""
    average.updates = start
    lit.train()  # as after a grid of samples: what is frozen stays in eval mode
    recorder = Recorder(average)
    (folder / "config.yaml").write_text("")
    config = {"trainer": {"accumulate_grad_batches": accumulate}}
    run = TrainingRun(folder, config, None, True, recorder, NoLogger(), time.monotonic())  # type: ignore[arg-type]

    def schedule(step: int, total: int) -> float:
        from ldm.training import lr

        return lr.cosine(step, total, warmup=WARMUP, end=END)

    callbacks = run.callbacks("steps", steps=STEPS, lr_schedule=schedule, log_every=1, save_every=STEPS, ema=average)
    fit(
        lit,
        data,
        [*callbacks, recorder],
        batch_size=BATCH,
        steps=STEPS,
        start=start,
        seed=lit.seed,  # type: ignore[arg-type]
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=accumulate,
    )
    return recorder.steps


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Build the optimizer of conf/training/_diffusion.yaml with this file's hyperparameters."""
    file = Path(__file__).parents[2] / "conf" / "training" / "_diffusion.yaml"
    node = OmegaConf.load(file)["optimizer"]
    return instantiate(node, lr=LR, betas=BETAS, weight_decay=DECAY, eps=EPS)(parameters)


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest number expected; of zeros, 0 if equal."""
    difference = float((actual.double() - expected).abs().max())
    return difference / max(float(expected.abs().max()), 1e-300) if difference else 0.0


def largest_difference(actual: Sequence[Step], expected: Sequence[Step]) -> dict[str, float]:
    """Return the largest relative difference of each part of the steps, by the part's name."""
    assert len(actual) == len(expected) > 1
    largest: dict[str, float] = {}

    def compare(part: str, a: Any, b: Any) -> None:
        a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
        largest[part] = max(largest.get(part, 0.0), relative_difference(a, b))

    for a, b in zip(actual, expected, strict=True):
        assert a.terms.keys() == b.terms.keys()
        for name, value in b.terms.items():
            compare(f"term {name}", a.terms[name], value)
        compare("norm", a.norm, b.norm)
        compare("lr", a.lr, b.lr)
        for part in ("gradients", "clipped", "weights", "average"):
            left, right = getattr(a, part), getattr(b, part)
            assert left.keys() == right.keys(), (part, left.keys() ^ right.keys())
            for name, value in right.items():
                compare(f"{part} {name}", left[name], value)
    return largest


def assert_steps_equal(actual: Sequence[Step], expected: Sequence[Step], precision: str) -> None:
    """Check that no number of the steps differs by more than the precision's tolerance."""
    differences = largest_difference(actual, expected)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE[precision]}
    assert not wrong, wrong
