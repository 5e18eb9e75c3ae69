"""Observing a sampler through its denoise function: every sampler, guidance and task can be observed without knowing of
it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoised
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.sampler import Draw, Sampler
from ldm.diffusion.schedule import Schedule


class Evaluation(NamedTuple):
    """One evaluation of the denoiser: the time t (), the state x_t (B, ...), and the predicted data x0 (B, ...)."""

    t: Tensor
    x_t: Tensor
    x0: Tensor


def record_evaluations(denoise: Denoise, evaluations: list[Evaluation]) -> Denoise:
    """Wrap a denoise function so that each of its evaluations is appended to `evaluations`."""

    def recorded(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoise(x_t, t)
        evaluations.append(Evaluation(t, x_t.clone(), estimate.x0.clone()))
        return estimate

    return recorded


def recorded_guidance(guidance: Guidance, evaluations: list[Evaluation]) -> Guidance:
    """Wrap a guidance so that each evaluation of its guided denoise function is appended to `evaluations`."""
    return lambda denoiser, cond, uncond: record_evaluations(guidance(denoiser, cond, uncond), evaluations)


def first_on_grid(evaluations: list[Evaluation], ts: Tensor) -> list[Evaluation]:
    """Return the first evaluation at each time of the grid (N + 1,); samplers of higher order also evaluate elsewhere,
    or twice.
    """
    first: dict[float, Evaluation] = {}
    for evaluation in evaluations:
        first.setdefault(float(evaluation.t), evaluation)
    return [first[float(t)] for t in ts if float(t) in first]


def states(run: Callable[[Denoise], Tensor], denoise: Denoise, ts: Tensor) -> Tensor:
    """Return the states (N + 1, B, ...) at the times of the grid that run(denoise), a sampler's call, goes through."""
    evaluations: list[Evaluation] = []
    last = run(record_evaluations(denoise, evaluations))
    return torch.stack([*(evaluation.x_t for evaluation in first_on_grid(evaluations, ts[:-1])), last])


class SamplingCancelled(Exception):
    """Raised within a sampler after its monitor was asked to stop."""


class SamplerState(NamedTuple):
    """The progress of a sampler.

    done, total: steps.  seconds: since the first step started.  x0: the predicted data (B, C, h, w), after guidance and
    constraints.
    show: x0 -> a picture (C, H, W) in [-1, 1] of it.
    """

    done: int
    total: int
    seconds: float
    x0: Tensor
    show: Callable[[Tensor], Tensor]

    @property
    def seconds_left(self) -> float:
        """Estimate the remaining time in seconds from the mean time of the steps so far."""
        return self.seconds / self.done * (self.total - self.done)


@dataclass
class SamplerMonitor:
    """The latest state of a running sampler, None before its first step; setting `stop` ends the sampler."""

    stop: Event = field(default_factory=Event)
    state: SamplerState | None = None

    def wrap(self, show: Callable[[Tensor], Tensor]) -> Callable[[Sampler], Sampler]:
        """Return a wrapper of samplers that updates `state`; once `stop` is set, the next evaluation raises
        SamplingCancelled.
        """

        def wrap_sampler(sampler: Sampler) -> Sampler:
            def monitored(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
                return sampler(self._monitored(denoise, ts, show), schedule, x, ts, noise)

            return monitored

        return wrap_sampler

    def _monitored(self, denoise: Denoise, ts: Tensor, show: Callable[[Tensor], Tensor]) -> Denoise:
        total, start = len(ts) - 1, time.monotonic()

        def monitored(x_t: Tensor, t: Tensor) -> Denoised:
            if self.stop.is_set():
                raise SamplingCancelled
            estimate = denoise(x_t, t)
            self.state = SamplerState(
                max(1, int((ts[:-1] >= t).sum())), total, time.monotonic() - start, estimate.x0, show
            )
            return estimate

        return monitored
