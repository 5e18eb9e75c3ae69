"""Samplers: (denoise, schedule, x, ts, noise) -> the state at ts[-1]. Each is one whole function.

x (B, ...) is the state at ts[0]; ts (N + 1,) descends within [0, 1] and is best kept in float64 on the CPU, where reading it never waits
for a device; noise(x) draws one standard normal shaped like x. All raise ValueError if ts does not descend within [0, 1].
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.variance import Variance, forward_variance, q_posterior, small

Draw = Callable[[Tensor], Tensor]
Sampler = Callable[[Denoise, Schedule, Tensor, Tensor, Draw], Tensor]


def steps(ts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (t, s), s < t, of a grid ts (N + 1,). Raises ValueError unless it descends within [0, 1]."""
    if ts.ndim != 1 or len(ts) < 2 or not (ts.diff() < 0).all() or ts[0] > 1 or ts[-1] < 0:
        raise ValueError(f"the grid must be two or more times that descend within [0, 1], got {ts.tolist()}; 1 is noise, 0 is data")
    return pairwise(ts)


def ddpm(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw, variance: Variance = small) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any sub-grid (Nichol & Dhariwal 2021, section 4)."""
    for t, s in steps(ts):
        x0, _, var_frac = denoise(x, t)
        x_t, (x, _) = x, q_posterior(schedule, x0, x, t, s)
        if s > 0:
            x = x + (0.5 * variance(var_frac, schedule, t, s)).exp() * noise(x_t)
    return x


def ddim(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021a, eq. 12 and 16): eta = 0 is deterministic, eta = 1 is DDPM and also Euler-ancestral."""
    for t, s in steps(ts):
        x0, eps, _ = denoise(x, t)
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        std = eta * sigma_s / schedule.alpha_sigma(t)[1] * forward_variance(schedule, t, s).sqrt()  # eq. 16
        x = alpha_s * x0 + (sigma_s**2 - std**2).sqrt() * eps  # eq. 12
        if std > 0:
            x = x + std * noise(x)
    return x


def euler(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
    """Euler's method on the probability-flow ODE in a straight frame (Karras et al. 2022, eq. 4): DDIM at eta = 0, term by term."""
    frame = straight(schedule)
    for t, s in steps(ts):
        (m_t, u_t), (m_s, u_s) = frame(t), frame(s)
        y = x / m_t
        d = (y - denoise(x, t).x0) / u_t
        x = m_s * (y + (u_s - u_t) * d)
    return x


def heun(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
    """Heun's 2nd-order method on the probability-flow ODE in a straight frame (Karras et al. 2022, algorithm 1); 2 N - 1 evaluations."""
    frame = straight(schedule)
    for t, s in steps(ts):
        (m_t, u_t), (m_s, u_s) = frame(t), frame(s)
        y = x / m_t
        d = (y - denoise(x, t).x0) / u_t
        x = m_s * (y + (u_s - u_t) * d)
        if s > 0:
            d_s = (x / m_s - denoise(x, s).x0) / u_s
            x = m_s * (y + (u_s - u_t) * (d + d_s) / 2)
    return x


def dpmpp_2m(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2): two-step, data prediction; the first step, and one to s = 0, are of first order."""
    x0_before = h_before = None
    for t, s in steps(ts):
        x0 = denoise(x, t).x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
        D = x0
        if x0_before is not None and s > 0:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        x = sigma_s / sigma_t * x + (alpha_s - sigma_s * alpha_t / sigma_t) * D  # alpha_s (1 - exp(-h)) D
        x0_before, h_before = x0, h
    return x


def straight(schedule: Schedule) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A frame t -> (m, u), u = sigma / m, in which y = x / m has the ODE dy/du = (y - x0) / u.

    m = alpha, where dy/du = eps, if there is signal at t = 1 (Karras et al. 2022, eq. 4); else m = alpha + sigma, where dy/du = eps - x0,
    which is finite there too and on a flow is dx/dt itself.
    """
    signal = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[0] > 0

    def frame(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha_sigma(t)
        m = alpha if signal else alpha + sigma
        return m, sigma / m

    return frame
