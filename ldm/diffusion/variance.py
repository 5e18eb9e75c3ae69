"""Reverse variances and likelihood: the posterior, the model's variance, Gaussian KL, decoders, bits per dimension.

A variance is a function (var_frac, schedule, t, s, floor=None) -> log-variance, s < t, shaped () or (B,), or (B, ...)
if learned.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, Denoised
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.errors import ConfigError
from ldm.tensors import expand, mean_per_sample

Variance = Callable[..., Tensor]
Decoder = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Return the variance of q(x_t | x_s), s < t: sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2.

    Kingma et al. 2021, eq. 22; DDPM's beta_t.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    return sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2


def q_posterior(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (B, ...) and variance () or (B,) of q(x_s | x_t, x0), s < t.

    Ho et al. 2020, eq. 7; in general Kingma et al. 2021, eq. 24-25.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    beta = forward_variance(schedule, t, s)
    of_x0, of_x_t = alpha_s * beta / sigma_t**2, alpha_t / alpha_s * (sigma_s / sigma_t) ** 2
    mean = expand(of_x0, x_t).to(x_t.dtype) * x0 + expand(of_x_t, x_t).to(x_t.dtype) * x_t
    return mean, beta * (sigma_s / sigma_t) ** 2


def fixed_small(
    var_frac: Tensor | None, schedule: Schedule, t: Tensor, s: Tensor, floor: Tensor | None = None
) -> Tensor:
    """Return the log of the posterior's variance (Ho et al. 2020, section 3.2: beta tilde).

    Where s = 0 that variance is 0 and `floor` replaces it; by default the variance of the step (2 t, t) (Nichol &
    Dhariwal 2021, their code).
    """
    variance = forward_variance(schedule, t, s) * (schedule.alpha_sigma(s)[1] / schedule.alpha_sigma(t)[1]) ** 2
    if floor is None:
        up = (2 * t).clamp(max=1)
        floor = forward_variance(schedule, up, t) * (schedule.alpha_sigma(t)[1] / schedule.alpha_sigma(up)[1]) ** 2
    return torch.where(s > 0, variance, floor).clamp(min=1e-20).log()


def fixed_large(
    var_frac: Tensor | None, schedule: Schedule, t: Tensor, s: Tensor, floor: Tensor | None = None
) -> Tensor:
    """Return the log of the forward variance (Ho et al. 2020, section 3.2: beta)."""
    return forward_variance(schedule, t, s).log()


def learned_range(
    var_frac: Tensor | None, schedule: Schedule, t: Tensor, s: Tensor, floor: Tensor | None = None
) -> Tensor:
    """Interpolate the log-variance (B, ...) from fixed_small (var_frac -1) to fixed_large (var_frac 1).

    Nichol & Dhariwal 2021, eq. 15.  Raises ConfigError if the network does not predict a var_frac.
    """
    if var_frac is None:
        raise ConfigError(
            "a learned variance needs twice the channels of x_t: train with learned_variance=true, "
            "or use fixed_small or fixed_large"
        )
    lo, hi = (expand(f(None, schedule, t, s, floor), var_frac) for f in (fixed_small, fixed_large))
    frac = (var_frac + 1) / 2
    return frac * hi + (1 - frac) * lo


def gaussian_kl(mean_q: Tensor, log_var_q: Tensor, mean_p: Tensor, log_var_p: Tensor) -> Tensor:
    """Compute KL(q || p) of diagonal Gaussians, element by element, in nats."""
    return 0.5 * (
        log_var_p - log_var_q - 1 + (log_var_q - log_var_p).exp() + (mean_q - mean_p) ** 2 * (-log_var_p).exp()
    )


def decoder_nll(x0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Compute -log p of 8-bit pixels x0 on [-1, 1] under a Gaussian integrated over each level's bin, in nats.

    Ho et al. 2020, eq. 13.
    """
    inv_std, edge = (-0.5 * log_var).exp(), 1e6  # edge: standard deviations, in place of infinity
    above = torch.where(x0 < 0.999, (x0 + 1 / 255 - mean) * inv_std, edge)
    below = torch.where(x0 > -0.999, (x0 - 1 / 255 - mean) * inv_std, -edge)
    flip = below > 0  # P(a < Z < b) = P(-b < Z < -a): work in the left tail, where the logarithm is exact
    above, below = torch.where(flip, -below, above), torch.where(flip, -above, below)
    log_above, log_below = torch.special.log_ndtr(above), torch.special.log_ndtr(below)
    return -(log_above + (-torch.expm1(log_below - log_above)).log())


def gaussian_nll(x0: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """Compute -log density of x0 under a Gaussian, element by element, in nats.

    The decoder of data without discrete levels, such as latents.
    """
    return 0.5 * (math.log(2 * math.pi) + log_var + (x0 - mean) ** 2 * (-log_var).exp())


def vlb_term(
    schedule: Schedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    estimate: Denoised,
    variance: Variance,
    decoder: Decoder,
) -> Tensor:
    """Compute one step's term of the bound (B,), bits per dimension (Ho et al. 2020, eq. 5).

    KL(q(x_s | x_t, x0) || p(x_s | x_t)), or, where s = 0, the decoder's -log p(x0 | x_t).
    """
    log_var_q = expand(fixed_small(None, schedule, t, s), x_t).to(x_t)
    log_var_p = expand(variance(estimate.var_frac, schedule, t, s), x_t).to(x_t)
    mean_q, _ = q_posterior(schedule, x0, x_t, t, s)
    mean_p, _ = q_posterior(schedule, estimate.x0, x_t, t, s)
    kl = gaussian_kl(mean_q, log_var_q, mean_p, log_var_p)
    last = expand(s == 0, x_t).to(x_t.device)
    return mean_per_sample(torch.where(last, decoder(x0, mean_p, log_var_p), kl)) / math.log(2)


def bits_per_dim(
    denoise: Denoise,
    schedule: Schedule,
    x0: Tensor,
    ts: Tensor,
    noise: Callable[[Tensor], Tensor],
    variance: Variance = fixed_small,
    decoder: Decoder = decoder_nll,
) -> dict[str, Tensor]:
    """Compute the bound on -log2 p(x0) per dimension (Ho et al. 2020, eq. 5).

    ts (N + 1,) descends to 0. The prior is N(0, alpha^2 + sigma^2) at ts[0], that of unit-variance data.
    Returns `total` (B,), its `prior` (B,) and its `terms` (N, B), in the order of ts.
    """
    alpha, sigma = schedule.alpha_sigma(ts[0])
    prior = mean_per_sample(
        gaussian_kl(alpha * x0, 2 * sigma.log(), torch.zeros_like(x0), (alpha**2 + sigma**2).log())
    ) / math.log(2)
    terms = []
    for t, s in pairwise(ts):
        x_t = add_noise(schedule, x0, noise(x0), t)
        terms.append(vlb_term(schedule, x0, x_t, t, s, denoise(x_t, t), variance, decoder))
    return {"total": prior + sum(terms), "prior": prior, "terms": torch.stack(terms)}
