"""Samplers built from a sampler: each runs `step` over single steps of the grid and changes the state between them."""

from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.sampler import Draw, Sampler, check_grid, ddim, ddpm, time_pairs
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.variance import forward_variance
from ldm.errors import ConfigError


def repaint_steps(n: int, jump: int, repeats: int) -> list[int]:
    """Return RePaint's walk over the n + 1 indices of a grid, of which 0 is noise.

    After every `jump` steps the walk goes back as many, repeats - 1 times (Lugmayr et al. 2022, section 4.2 and their
    code, j and r).
    Raises ConfigError unless 1 <= jump and 1 <= repeats.
    """
    if jump < 1 or repeats < 1:
        raise ConfigError(
            f"jump_length={jump} num_resamples={repeats}: expected 1 or more each (num_resamples=1 is no resampling)"
        )
    left = {n - 1 - j: repeats - 1 for j in range(0, n - jump, jump)}
    walk = [0]
    while walk[-1] < n:
        walk.append(walk[-1] + 1)
        if left.get(walk[-1], 0):
            left[walk[-1]] -= 1
            walk += [walk[-1] - k for k in range(1, jump + 1)]
    return walk


def repaint(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    ts: Tensor,
    noise: Draw,
    step: Sampler = ddpm,
    jump_length: int = 10,
    num_resamples: int = 10,
) -> Tensor:
    """Sample with RePaint's resampling (Lugmayr et al. 2022, algorithm 1).

    It walks the grid down and up so that sampled and known parts agree.
    The known part is imposed by constraint.keep_known; with it a DDPM step is the paper's, up to one draw of noise.
    """
    check_grid(ts)
    for a, b in pairwise(repaint_steps(len(ts) - 1, jump_length, num_resamples)):
        if b > a:
            x = step(denoise, schedule, x, ts[a : b + 1], noise)
        else:
            t, s = ts[b], ts[a]
            ratio = schedule.alpha_sigma(t)[0] / schedule.alpha_sigma(s)[0]
            x = ratio * x + forward_variance(schedule, t, s).sqrt() * noise(x)
    return x


def langevin(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    ts: Tensor,
    noise: Draw,
    step: Sampler = ddim,
    snr: float = 0.16,
    corrections: int = 1,
) -> Tensor:
    """Sample with a predictor and a corrector (Song et al. 2021b, algorithms 2-3).

    Each step is followed by Langevin steps on the score -eps / sigma.
    Their step size 2 (snr |z| / |score|)^2 is replaced by its expectation, |z| / |score| = sigma, so that rows are
    independent.
    """
    for t, s in time_pairs(ts):
        x = step(denoise, schedule, x, torch.stack([t, s]), noise)
        sigma = schedule.alpha_sigma(s)[1]
        size = 2 * (snr * sigma) ** 2
        for _ in range(corrections if s > 0 else 0):
            score = -denoise(x, s).eps / sigma
            x = x + size * score + (2 * size).sqrt() * noise(x)
    return x
