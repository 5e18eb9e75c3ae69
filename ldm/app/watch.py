"""A look at a sampler at work: how far it is, what data it expects, and a way to stop it. Samplers know nothing of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoised
from ldm.diffusion.sampler import Draw, Sampler
from ldm.diffusion.schedule import Schedule


class Stopped(Exception):
    """A person asked for an end."""


class Seen(NamedTuple):
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
class Watch:
    """What a drawing has come to: `seen` at its last step, None before the first."""

    stop: Event = field(default_factory=Event)
    seen: Seen | None = None

    def over(self, decode: Callable[[Tensor], Tensor]) -> Callable[[Sampler], Sampler]:
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
                raise Stopped
            estimate = denoise(x_t, t)
            self.seen = Seen(max(1, int((ts[:-1] >= t).sum())), total, time.monotonic() - began, estimate.x0, decode)
            return estimate

        return look
