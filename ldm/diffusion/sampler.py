"""Samplers: (denoise, schedule, x, ts, noise) -> the state at ts[-1]. Each is one complete function.

x (B, ...) is the state at ts[0]; ts (N + 1,) descends within [0, 1] and should be float64 on the CPU, where reading it
needs no synchronisation with a device; noise(x) draws one standard normal shaped like x. All raise ConfigError if ts
does not descend within [0, 1].
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.variance import Variance, fixed_small, forward_variance, q_posterior
from ldm.errors import ConfigError

Draw = Callable[[Tensor], Tensor]
Sampler = Callable[[Denoise, Schedule, Tensor, Tensor, Draw], Tensor]


def check_grid(ts: Tensor) -> None:
    """Raise ConfigError unless ts (N + 1,), N >= 1, descends within [0, 1]."""
    if ts.ndim != 1 or len(ts) < 2 or not (ts.diff() < 0).all() or ts[0] > 1 or ts[-1] < 0:
        raise ConfigError(
            f"the grid must be two or more times that descend within [0, 1], got {ts.tolist()}; 1 is noise, 0 is data"
        )


def time_pairs(ts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over the pairs (t, s), s < t, of a grid ts (N + 1,).

    Raises ConfigError unless it descends within [0, 1].
    """
    check_grid(ts)
    return pairwise(ts)


def ddpm(
    denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw, variance: Variance = fixed_small
) -> Tensor:
    """Sample ancestrally (Ho et al. 2020, algorithm 2), on any sub-grid (Nichol & Dhariwal 2021, section 4)."""
    for t, s in time_pairs(ts):
        x0, _, var_frac = denoise(x, t)
        x, _ = q_posterior(schedule, x0, x, t, s)
        if s > 0:
            x = x + (0.5 * variance(var_frac, schedule, t, s)).exp() * noise(x)
    return x


def ddim(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw, eta: float = 0.0) -> Tensor:
    """Sample with DDIM (Song et al. 2021a, eq. 12 and 16).

    eta = 0 is deterministic, eta = 1 is DDPM and also Euler-ancestral.
    """
    for t, s in time_pairs(ts):
        x0, eps, _ = denoise(x, t)
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        std = eta * sigma_s / schedule.alpha_sigma(t)[1] * forward_variance(schedule, t, s).sqrt()  # eq. 16
        x = alpha_s * x0 + (sigma_s**2 - std**2).sqrt() * eps  # eq. 12
        if std > 0:
            x = x + std * noise(x)
    return x


def consistency(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
    """Sample a consistency model in several steps (Song et al. 2023, algorithm 1): estimate x0, add noise, repeat."""
    for t, s in time_pairs(ts):
        x0 = denoise(x, t).x0
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        x = alpha_s * x0 + sigma_s * noise(x) if s > 0 else x0
    return x


def tcd(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw, gamma: float = 0.3) -> Tensor:
    """Sample a trajectory consistency model (Zheng et al. 2024, algorithm 4).

    Each step goes down to (1 - gamma) s with DDIM, and back up to s by adding noise: gamma = 0 is DDIM, gamma = 1 is
    `consistency`.
    """
    for t, s in time_pairs(ts):
        x0, eps, _ = denoise(x, t)
        below = (1 - gamma) * s
        (alpha_s, _), (alpha, sigma) = schedule.alpha_sigma(s), schedule.alpha_sigma(below)
        x = alpha * x0 + sigma * eps if below > 0 else x0
        if s > below:
            x = alpha_s / alpha * x + forward_variance(schedule, s, below).sqrt() * noise(x)
    return x


def ddim_invert(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
    """Run DDIM backwards, from the state x at ts[-1] to the state at ts[0] (Song et al. 2021a, section 4.3).

    Raises ConfigError if ts ends at 0, where eps is not defined; start at 1/T instead.
    """
    check_grid(ts)
    if ts[-1] == 0:
        raise ConfigError(
            "inversion cannot start at t = 0, where there is no eps; give a grid that ends at 1/T (grids.replace_end)"
        )
    for t, s in reversed(list(pairwise(ts))):
        x0, eps, _ = denoise(x, s)
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        x = alpha_t * x0 + sigma_t * eps
    return x


def euler(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    ts: Tensor,
    noise: Draw,
    s_churn: float = 0.0,
    s_range: tuple[float, float] = (0.0, float("inf")),
    s_noise: float = 1.0,
) -> Tensor:
    """Solve the ODE with Euler's method in a straight frame (Karras et al. 2022, algorithm 2, lines 4-8).

    Without churn it is DDIM.
    """
    frame, pairs = ode_frame(schedule), list(time_pairs(ts))
    gamma = min(s_churn / len(pairs), 2**0.5 - 1)
    for t, s in pairs:
        x, t = add_churn(schedule, x, t, noise, gamma, s_range, s_noise)
        (m_t, u_t), (m_s, u_s) = frame(t), frame(s)
        y = x / m_t
        d = (y - denoise(x, t).x0) / u_t
        x = m_s * (y + (u_s - u_t) * d)
    return x


def heun(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    ts: Tensor,
    noise: Draw,
    s_churn: float = 0.0,
    s_range: tuple[float, float] = (0.0, float("inf")),
    s_noise: float = 1.0,
) -> Tensor:
    """Solve the ODE with Heun's 2nd-order method in a straight frame (Karras et al. 2022, algorithm 2).

    2 N - 1 evaluations to s = 0.
    """
    frame, pairs = ode_frame(schedule), list(time_pairs(ts))
    gamma = min(s_churn / len(pairs), 2**0.5 - 1)
    for t, s in pairs:
        x, t = add_churn(schedule, x, t, noise, gamma, s_range, s_noise)
        (m_t, u_t), (m_s, u_s) = frame(t), frame(s)
        y = x / m_t
        d = (y - denoise(x, t).x0) / u_t
        x = m_s * (y + (u_s - u_t) * d)
        if s > 0:
            d_s = (x / m_s - denoise(x, s).x0) / u_s
            x = m_s * (y + (u_s - u_t) * (d + d_s) / 2)
    return x


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
    """Sample with PLMS (Liu et al. 2022 (PNDM), eq. 12); N + 1 evaluations.

    The start is the improved Euler step of Rombach et al.'s code.
    Adams-Bashforth 4 with the weights of equal steps in a straight frame's u: order 2 on a general grid, 3 (by its
    start) on an even one.
    """
    frame = ode_frame(schedule)
    past: list[Tensor] = []
    for t, s in time_pairs(ts):
        (m_t, u_t), (m_s, u_s) = frame(t), frame(s)
        y = x / m_t
        d = (y - denoise(x, t).x0) / u_t
        past = [d, *past[:3]]
        if len(past) == 1 and s > 0:
            y_s = y + (u_s - u_t) * d
            mixed = (d + (y_s - denoise(m_s * y_s, s).x0) / u_s) / 2
        else:
            mixed = torch.stack([w * p for w, p in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True)]).sum(0)
        x = m_s * (y + (u_s - u_t) * mixed)
    return x


def dpmpp_2m(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw, eta: float = 0.0) -> Tensor:
    """Sample with DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2).

    eta = 1 is the same step of the SDE (their SDE-DPM-Solver++ 2M).
    Data prediction; the first step, and one to s = 0, are of first order.
    """
    before: tuple[Tensor, Tensor] | None = None
    for t, s in time_pairs(ts):
        x0 = denoise(x, t).x0
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        h = schedule.log_snr(s) - schedule.log_snr(t)  # twice theirs: only its ratio r counts
        ratio = alpha_t * sigma_s / (sigma_t * alpha_s)  # their exp(-h), also where h is infinite
        D = x0
        if before is not None and s > 0:
            x0_before, h_before = before
            r = h_before / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * x0_before
        std = sigma_s * (1 - ratio ** (2 * eta)).sqrt()
        x = sigma_s / sigma_t * ratio**eta * x + alpha_s * (1 - ratio ** (1 + eta)) * D
        if std > 0:
            x = x + std * noise(x)
        before = x0, h
    return x


def unipc(denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw) -> Tensor:
    """Sample with UniPC-2, B(h) = e^h - 1, data prediction (Zhao et al. 2023, algorithms 1-2, "bh2"); N evaluations.

    Each step is predicted (UniP) and, once x0 is known at its end, corrected (UniC). The first, and one to s = 0, are
    of first order.
    """
    correct: Callable[[Tensor], Tensor] | None = None
    before: tuple[Tensor, Tensor] | None = None
    known: Tensor | float
    rho: Tensor | float
    for t, s in time_pairs(ts):
        x0 = denoise(x, t).x0
        if correct is not None:
            x = correct(x0)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
        B = 1 - alpha_t * sigma_s / (sigma_t * alpha_s)  # 1 - exp(-h), also where h is infinite
        base = sigma_s / sigma_t * x + alpha_s * B * x0
        if before is None or s == 0:
            x, known, rho = base, 0.0, 1 / 2
        else:
            x0_before, h_before = before
            r = -h_before / h
            slope = (x0_before - x0) / r
            phi_2 = 1 - B / h
            phi_3 = phi_2 / h - 1 / 2
            b_1, b_2 = phi_2 / B, -2 * phi_3 / B
            rho_1, x = (b_1 - b_2) / (1 - r), base + alpha_s * B / 2 * slope  # UniP
            known, rho = rho_1 * slope, b_1 - rho_1
        correct = partial(_unic, base, alpha_s * B, known, rho, x0)
        before = x0, h
    return x


def _unic(base: Tensor, scale: Tensor, known: Tensor | float, rho: Tensor | float, x0: Tensor, x0_s: Tensor) -> Tensor:
    return base + scale * (known + rho * (x0_s - x0))


def interpolant_sde(
    denoise: Denoise, schedule: Schedule, x: Tensor, ts: Tensor, noise: Draw, strength: float = 1.0
) -> Tensor:
    """Solve the reverse SDE of a stochastic interpolant with Euler-Maruyama, w = strength sigma.

    Ma et al. 2024 (SiT), eq. 4, section 2.4. Time is measured in sigma, which on a flow is t itself. The step to s = 0
    has neither score nor noise.
    """
    for t, s in time_pairs(ts):
        x0, eps, _ = denoise(x, t)
        (_, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        h, w = sigma_t - sigma_s, strength * sigma_t
        x = alpha_s * x0 + sigma_s * eps
        if s > 0:
            x = x - w / 2 * h * eps / sigma_t + (w * h).sqrt() * noise(x)
    return x


def add_churn(
    schedule: Schedule, x: Tensor, t: Tensor, noise: Draw, gamma: float, within: tuple[float, float], noise_scale: float
) -> tuple[Tensor, Tensor]:
    """Add noise so that sigma / alpha grows by a factor of 1 + gamma, where it is `within` a range; return (x, t).

    Karras et al. 2022, algorithm 2, lines 4-6.
    """
    alpha, sigma = schedule.alpha_sigma(t)
    if gamma == 0 or alpha == 0 or not within[0] <= sigma / alpha <= within[1]:
        return x, t
    t_hat = schedule.t_from_log_snr(schedule.log_snr(t) - 2 * math.log1p(gamma))
    alpha_hat, sigma_hat = schedule.alpha_sigma(t_hat)
    ratio = alpha_hat / alpha
    return ratio * x + noise_scale * (sigma_hat**2 - (ratio * sigma) ** 2).sqrt() * noise(x), t_hat


def ode_frame(schedule: Schedule) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a frame t -> (m, u), u = sigma / m, in which y = x / m has the ODE dy/du = (y - x0) / u.

    m = alpha, where dy/du = eps, if there is signal at t = 1 (Karras et al. 2022, eq. 4); else m = alpha + sigma, where
    dy/du = eps - x0, which is finite there too and on a flow is dx/dt itself.
    """
    signal = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[0] > 0

    def frame(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha_sigma(t)
        m = alpha if signal else alpha + sigma
        return m, sigma / m

    return frame
