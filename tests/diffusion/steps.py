"""The samplers' steps for Gaussian data, written down a second time as maps x_s = a x_t + b + std z: (a, b, variance).

With k = Cov(x0, x_t) / Var(x_t), E[x0 | x_t] = m + k (x_t - alpha m), so that a step x_s = A x0 + E eps + C x_t + std z
is affine in x_t.
"""

import math
from functools import partial

import torch
from cases import f64

from ldm.diffusion import correction, sampler, schedule, variance

ORDERED = {
    "linear": schedule.linear(),
    "vp": schedule.VP(),
    "cosine": schedule.cosine(),
    "flow": schedule.Flow(),
    "edm": schedule.EDM(),
}


def affine_step(g, t, A, E, C):
    alpha, sigma = (float(c) for c in g.schedule.alpha_sigma(t))
    k = alpha * g.std**2 / ((alpha * g.std) ** 2 + sigma**2)
    slope, constant = k, g.mean - k * alpha * g.mean  # of E[x0 | x_t]
    return A * slope + E * (1 - alpha * slope) / sigma + C, A * constant - E * alpha * constant / sigma


def coefficients(sched, t, s):
    (a_t, s_t), (a_s, s_s) = ([float(c) for c in sched.alpha_sigma(v)] for v in (t, s))
    return a_t, s_t, a_s, s_s


def ddpm_step(large):
    def step(g, t, s):
        a_t, s_t, a_s, s_s = coefficients(g.schedule, t, s)
        beta = s_t**2 - (a_t / a_s * s_s) ** 2
        var = beta if large else beta * s_s**2 / s_t**2
        return *affine_step(g, t, a_s * beta / s_t**2, 0, a_t / a_s * s_s**2 / s_t**2), var * float(s > 0)

    return step


def ddim_step(eta):
    def step(g, t, s):
        a_t, s_t, a_s, s_s = coefficients(g.schedule, t, s)
        var = eta**2 * (s_s / s_t) ** 2 * (s_t**2 - (a_t / a_s * s_s) ** 2)
        return *affine_step(g, t, a_s, math.sqrt(s_s**2 - var), 0), var

    return step


def sde_step(strength):
    def step(g, t, s):
        _, s_t, a_s, s_s = coefficients(g.schedule, t, s)
        h, w = s_t - s_s, strength * s_t  # dX = v dt - w/2 score dt + sqrt(w) dW, score = -eps / sigma, backwards
        return *affine_step(g, t, a_s, s_s - (w / 2 * h / s_t if s > 0 else 0), 0), w * h * float(s > 0)

    return step


def tcd_step(gamma):
    def step(g, t, s):
        low = (1 - gamma) * s
        a, b, _ = ddim_step(0.0)(g, t, low)
        a_s, s_s, a_low, s_low = coefficients(g.schedule, s, low)
        return a_s / a_low * a, a_s / a_low * b, s_s**2 - (a_s / a_low * s_low) ** 2

    return step


def learned_step(var_frac):
    def step(g, t, s):
        a, b, low = ddpm_step(False)(g, t, s)
        return a, b, low ** ((1 - var_frac) / 2) * ddpm_step(True)(g, t, s)[2] ** ((1 + var_frac) / 2)

    return step


def ddpm_learned(denoise, schedule, x, ts, noise):
    """The sampler of a network that says var_frac 0.3 everywhere."""
    says = lambda x, t: denoise(x, t)._replace(var_frac=torch.full_like(x, 0.3))  # noqa: E731
    return sampler.ddpm(says, schedule, x, ts, noise, variance=variance.learned_range)


def langevin_step(snr):
    def step(g, t, s):
        a, b, _ = ddim_step(0.0)(g, t, s)
        if s == 0:
            return a, b, 0.0
        e, f = affine_step(g, s, 0, 1, 0)  # eps
        sigma = float(g.schedule.alpha_sigma(s)[1])
        size = 2 * (snr * sigma) ** 2
        return (1 - size * e / sigma) * a, (1 - size * e / sigma) * b - size * f / sigma, 2 * size

    return step


STOCHASTIC = {
    "ddpm": (sampler.ddpm, ddpm_step(False)),
    "ddpm_large": (partial(sampler.ddpm, variance=variance.fixed_large), ddpm_step(True)),
    "ddim_1": (partial(sampler.ddim, eta=1.0), ddim_step(1.0)),
    "ddim_half": (partial(sampler.ddim, eta=0.5), ddim_step(0.5)),
    "interpolant_sde": (sampler.interpolant_sde, sde_step(1.0)),
    "interpolant_sde_half": (partial(sampler.interpolant_sde, strength=0.5), sde_step(0.5)),
    "ddpm_learned": (ddpm_learned, learned_step(0.3)),
    "langevin": (correction.langevin, langevin_step(0.16)),
}
FOR_STUDENTS = {  # of consistency distillation; of another model they do not draw its distribution
    "tcd": (partial(sampler.tcd, gamma=0.4), tcd_step(0.4)),
}


def recursion(steps):
    """(a, b, c) of steps x -> A x + B + std z, one after another."""
    a, b, var = 1.0, 0.0, 0.0
    for A, B, extra in steps:
        a, b, var = A * a, A * b + B, A**2 * var + float(extra)
    return a, b, math.sqrt(var)


def noised(g, t, gamma):
    """Algorithm 2, line 6, as a step; and the time it leads to."""
    alpha, sigma = (float(c) for c in g.schedule.alpha_sigma(t))
    t_hat = g.schedule.t_from_log_snr(-2 * f64(sigma / alpha * (1 + gamma)).log())[0]
    a_hat, s_hat = (float(c) for c in g.schedule.alpha_sigma(t_hat))
    return (a_hat / alpha, 0.0, s_hat**2 - (a_hat / alpha * sigma) ** 2), t_hat


def euler_step(g, t, s, second):
    """Lines 7-11, in y = x / m over u = sigma / m, where dy/du = (y - E[x0 | x]) / u."""
    flow = g.schedule == schedule.Flow()
    (m_t, u_t), (m_s, u_s) = (
        (1.0, c[1]) if flow else (c[0], c[1] / c[0])
        for c in (tuple(map(float, g.schedule.alpha_sigma(v))) for v in (t, s))
    )

    def slope(v, m, u):  # dy/du as a map of y
        k, c = affine_step(g, v, 1, 0, 0)
        return (1 - k * m) / u, -c / u

    h, (p, q) = u_s - u_t, slope(t, m_t, u_t)
    if second and s > 0:
        p_s, q_s = slope(s, m_s, u_s)
        p, q = (p + p_s * (1 + h * p)) / 2, (q + p_s * h * q + q_s) / 2
    return m_s / m_t * (1 + h * p), m_s * h * q, 0.0
