"""Training steps recomputed with plain tensors: records of a training; optimizers and averages in closed form."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import Tensor

TOLERANCE = {"64": 1e-10, "32": 1e-5}


@dataclass
class Step:
    """A step of a training: the rows (epoch, index) of all its batches, its terms, its gradients by the optimizer that
    took them, and the parameters after it.
    """

    rows: list[tuple[int, int]]
    terms: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


class StepRecorder(L.Callback):
    """Record the parameters before a training and every step of it."""

    def __init__(self):
        self.start: dict[str, Tensor] = {}
        self.steps: list[Step] = []
        self.gradients: dict[str, Tensor] = {}

    def on_fit_start(self, trainer, lit):
        self.start = copies(lit)

    def on_train_batch_start(self, trainer, lit, batch, batch_idx):
        self.gradients = {}

    def on_before_optimizer_step(self, trainer, lit, optimizer):
        names = {id(p): name for name, p in lit.named_parameters()}
        for group in optimizer.param_groups:
            self.gradients |= {names[id(p)]: p.grad.clone() for p in group["params"]}

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        rows = list(zip(batch["epoch"], batch["index"], strict=True))
        terms = {name: value.detach().clone() for name, value in outputs.items()}
        self.steps.append(Step(rows, terms, self.gradients, copies(lit)))


def copies(lit: L.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lit.named_parameters()}


@dataclass
class Adam:
    """Adam (Kingma & Ba 2015, algorithm 1) with decoupled decay (Loshchilov & Hutter 2019, algorithm 2), with its
    moments as sums over all gradients so far.
    """

    lr: float
    betas: tuple[float, float]
    weight_decay: float = 0.0
    eps: float = 1e-8
    gradients: list[Tensor] = field(default_factory=list)

    def step(self, p: Tensor, gradient: Tensor, factor: float = 1.0) -> Tensor:
        """Return p after a step. factor: of the learning rate."""
        self.gradients.append(gradient)
        first, second = (
            sum((1 - beta) * beta**age * g**power for age, g in enumerate(reversed(self.gradients)))
            / (1 - beta ** len(self.gradients))
            for beta, power in zip(self.betas, (1, 2), strict=True)
        )
        lr = self.lr * factor
        return p - lr * self.weight_decay * p - lr * first / (second.sqrt() + self.eps)


def warm_cosine(step: int, total: int, warmup: int, end: float) -> float:
    """Linear warm-up times a cosine from 1 to `end`, half a period over the training (Loshchilov & Hutter 2017)."""
    return min(1, (step + 1) / (warmup + 1)) * (end + (1 - end) * math.cos(math.pi * step / total / 2) ** 2)


def average_exponent(sigma_rel: float) -> float:
    """Solve sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3)) for g by bisection: the width of the density of t^g on [0, 1].

    Karras et al. 2024, eq. 126.
    """
    low, high = 0.0, 1e4
    for _ in range(200):
        g = (low + high) / 2
        if (g + 1) / ((g + 2) ** 2 * (g + 3)) > sigma_rel**2:
            low = g
        else:
            high = g
    return low


def power_average(values: Sequence[Tensor], sigma_rel: float) -> Tensor:
    """The average of the weights after steps 1 ... n by EDM2's recursion (Karras et al. 2024, eq. 127)."""
    gamma, average = average_exponent(sigma_rel), torch.zeros_like(values[0])
    for n, value in enumerate(values, 1):
        beta = (1 - 1 / n) ** (gamma + 1)
        average = beta * average + (1 - beta) * value
    return average


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of two dictionaries of equal keys, relative to the larger of 1 and each tensor's norm."""
    assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
    return max(
        (
            float((ours[name].double() - torch.as_tensor(value, dtype=torch.float64)).norm())
            / max(1.0, float(torch.as_tensor(value, dtype=torch.float64).norm()))
            for name, value in expected.items()
        ),
        default=0.0,
    )


def mean_of(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each entry."""
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def chunks(rows: Sequence, parts: int) -> list[Sequence]:
    size = len(rows) // parts
    return [rows[low : low + size] for low in range(0, len(rows), size)]


Terms = dict[str, Tensor]
Compute = Callable[[dict[str, Tensor], Sequence[tuple[int, int]]], tuple[Terms, dict[str, Tensor]]]


def recompute(
    recorder: StepRecorder,
    compute: Compute,
    adams: dict[str, Adam],
    factor: Callable[[int], float],
    parts: int,
    limits: dict[str, float] | None = None,
) -> dict[str, float]:
    """Recompute every recorded step from the parameters before the first alone; return the largest distances.

    compute: (parameters, rows of one batch) -> its terms, and gradients of the parameters that move.  adams: by
    parameter.  factor: step -> factor of all learning rates.  parts: batches per step.  limits: by parameter, the
    largest value after a step.
    """
    weights = {name: value.double() for name, value in recorder.start.items()}
    worst = {"terms": 0.0, "gradients": 0.0, "weights": 0.0}
    for number, step in enumerate(recorder.steps):
        results = [compute(weights, rows) for rows in chunks(step.rows, parts)]
        terms, gradients = mean_of([result[0] for result in results]), mean_of([result[1] for result in results])
        weights = weights | {
            name: adams[name].step(weights[name], gradient, factor(number)) for name, gradient in gradients.items()
        }
        weights |= {name: weights[name].clip(max=limit) for name, limit in (limits or {}).items()}
        for name, ours, expected in (
            ("terms", step.terms, terms),
            ("gradients", step.gradients, gradients),
            ("weights", step.weights, weights),
        ):
            worst[name] = max(worst[name], distance(ours, expected))
    return worst
