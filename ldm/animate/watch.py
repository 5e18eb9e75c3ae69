"""A denoise function that writes down what passes: every sampler, guidance and task can be watched, and none of them knows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoised
from ldm.diffusion.guidance import Guidance


class Seen(NamedTuple):
    """One evaluation: the time t (), the state x_t (B, ...), and the data x0 (B, ...) that was expected there."""

    t: Tensor
    x_t: Tensor
    x0: Tensor


def watched(denoise: Denoise, seen: list[Seen]) -> Denoise:
    """The same denoise function, each of its evaluations appended to `seen`."""

    def watch(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoise(x_t, t)
        seen.append(Seen(t, x_t.clone(), estimate.x0.clone()))
        return estimate

    return watch


def under(guidance: Guidance, seen: list[Seen]) -> Guidance:
    """The same guidance, what it answers appended to `seen`."""
    return lambda denoiser, cond, uncond: watched(guidance(denoiser, cond, uncond), seen)


def on_grid(seen: list[Seen], ts: Tensor) -> list[Seen]:
    """Of what was seen the first at each time of the grid (N + 1,): a sampler of higher order also looks elsewhere, or twice."""
    first: dict[float, Seen] = {}
    for one in seen:
        first.setdefault(float(one.t), one)
    return [first[float(t)] for t in ts if float(t) in first]


def states(run: Callable[[Denoise], Tensor], denoise: Denoise, ts: Tensor) -> Tensor:
    """The states (N + 1, B, ...) at each time of the grid that run(denoise), a sampler's call, passes through."""
    seen: list[Seen] = []
    last = run(watched(denoise, seen))
    return torch.stack([*(one.x_t for one in on_grid(seen, ts[:-1])), last])
