"""A denoise function that writes down what passes: every sampler, guidance and task can be watched, and none of them knows."""

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
    """One evaluation: the time t (), the state x_t (B, ...), and the data x0 (B, ...) that was expected there."""

    t: Tensor
    x_t: Tensor
    x0: Tensor


def record_evaluations(denoise: Denoise, seen: list[Evaluation]) -> Denoise:
    """The same denoise function, each of its evaluations appended to `seen`."""

    def watch(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoise(x_t, t)
        seen.append(Evaluation(t, x_t.clone(), estimate.x0.clone()))
        return estimate

    return watch


def recorded_guidance(guidance: Guidance, seen: list[Evaluation]) -> Guidance:
    """The same guidance, what it answers appended to `seen`."""
    return lambda denoiser, cond, uncond: record_evaluations(guidance(denoiser, cond, uncond), seen)


def first_on_grid(seen: list[Evaluation], ts: Tensor) -> list[Evaluation]:
    """Of what was seen the first at each time of the grid (N + 1,): a sampler of higher order also looks elsewhere, or twice."""
    first: dict[float, Evaluation] = {}
    for one in seen:
        first.setdefault(float(one.t), one)
    return [first[float(t)] for t in ts if float(t) in first]


def states(run: Callable[[Denoise], Tensor], denoise: Denoise, ts: Tensor) -> Tensor:
    """The states (N + 1, B, ...) at each time of the grid that run(denoise), a sampler's call, passes through."""
    seen: list[Evaluation] = []
    last = run(record_evaluations(denoise, seen))
    return torch.stack([*(one.x_t for one in first_on_grid(seen, ts[:-1])), last])


class SamplingCancelled(Exception):
    """A person asked for an end."""


class SamplerState(NamedTuple):
    """Step `done` of `total`, begun so many seconds ago; x0 (B, C, h, w) is the data expected there, guidance and constraints in it.

    decode: x0 -> images (B, C, H, W) in [-1, 1].
    """

    done: int
    total: int
    seconds: float
    x0: Tensor
    decode: Callable[[Tensor], Tensor]

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        return self.seconds / self.done * (self.total - self.done)


@dataclass
class SamplerMonitor:
    """What a drawing has come to: `seen` at its last step, None before the first."""

    stop: Event = field(default_factory=Event)
    state: SamplerState | None = None

    def wrap(self, decode: Callable[[Tensor], Tensor]) -> Callable[[Sampler], Sampler]:
        """What makes of a sampler the same one, looked at; once `stop` is set its next evaluation raises Stopped."""

        def around(sampler: Sampler) -> Sampler:
            def watched(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
                return sampler(self._on(denoise, ts, decode), schedule, x, ts, noise)

            return watched

        return around

    def _on(self, denoise: Denoise, ts: Tensor, decode: Callable[[Tensor], Tensor]) -> Denoise:
        total, began = len(ts) - 1, time.monotonic()

        def look(x_t: Tensor, t: Tensor) -> Denoised:
            if self.stop.is_set():
                raise SamplingCancelled
            estimate = denoise(x_t, t)
            self.state = SamplerState(
                max(1, int((ts[:-1] >= t).sum())), total, time.monotonic() - began, estimate.x0, decode
            )
            return estimate

        return look
