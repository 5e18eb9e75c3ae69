"""Fixed pairs (t, eps) by noise level, at which the losses of different weights and of different runs can be compared.

A level is one of K equal strata of the density from which an objective draws t, so that the mean over the levels
estimates the loss that is trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.diffusion.objective import LossSecondMoment
from ldm.diffusion.prior_preservation import PriorPreservation
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Density, independent
from ldm.tensors import KeyedNoise, derive_seed

GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, are spread evenly over [0, 1), however many


@dataclass(frozen=True)
class LevelNoise(KeyedNoise):
    """Keyed noise in which the quantile of t is fixed: it is in stratum `level` of `levels`.

    number: of each row among all whose times shall be spread evenly: 0, 1, 2, ...
    """

    number: Sequence[int] = ()
    level: int = 0
    levels: int = 1

    def uniform(self, purpose: str, x: Tensor) -> Tensor:
        """Draw as KeyedNoise does, but for the purpose "t" return the fixed quantiles (B,) in [0, 1)."""
        if purpose != "t":
            return super().uniform(purpose, x)
        return fixed_quantiles(self.number, self.level, self.levels).to(x)


def fixed_quantiles(number: Sequence[int], level: int, levels: int) -> Tensor:
    """Return u (B,) float64 in [level / levels, (level + 1) / levels), below 1 in float32 too.

    number: of each row. The position of rows 0, 1, 2, ... within the stratum is the additive recurrence of the golden
    ratio (Kuipers & Niederreiter 1974, chapter 2, section 3): of low discrepancy however many rows there are, and that
    of a row does not depend on how many there are.
    """
    within = (0.5 + torch.tensor(list(number), dtype=torch.float64) * GOLDEN) % 1
    return ((level + within) / levels).clamp(max=1 - 2**-24)


def level_noise(seed: int, index: Sequence[int], number: Sequence[int], level: int, levels: int) -> LevelNoise:
    """Return the noise of samples at a level: a function of (seed, index, level), and t one of (number, level, levels).

    The samples' position in the batch is 0 of 1, so that a stratified draw of t uses the fixed quantile as it is.
    """
    return LevelNoise(derive_seed(seed, "validation", level), index, [0] * len(index), 1, number, level, levels)


@contextmanager
def timestep_density(objective: nn.Module, density: Density | None) -> Iterator[None]:
    """Let an objective, and those within it, draw t from another density within the block; None leaves their own.

    t is rounded to the grid of a schedule that has one.
    """
    parts: list[Any] = [part for part in objective.modules() if density is not None and hasattr(part, "times")]
    before = [part.times for part in parts]
    for part in parts:
        part.times = partial(independent, density=partial(on_grid, cast(Density, density)))
    try:
        yield
    finally:
        for part, times in zip(parts, before, strict=True):
            part.times = times


def on_grid(density: Density, u: Tensor, schedule: Schedule) -> Tensor:
    """Return the density's t (B,) for u (B,), rounded to the nearest of 1/T, ..., 1 if the schedule has a table."""
    t, T = density(u, schedule), getattr(schedule, "T", None)
    return t if T is None else (t * T).round().clamp(1, T) / T


def per_row_objective(objective: nn.Module) -> nn.Module:
    """Return an objective without the wrappers by which a row's loss depends on its batch or on the training so far.

    Both only weight rows: the expectation of LossSecondMoment's loss is that of the objective in it, and
    PriorPreservation multiplies by the share of a kind of rows.
    """
    inner: Any = objective
    while isinstance(inner, LossSecondMoment | PriorPreservation):
        inner = inner.objective
    return inner
