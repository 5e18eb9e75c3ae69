"""Reverse variances: the posterior q(x_s | x_t, x0) and the choices for the model's own."""

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.tensors import expand

Variance = Callable[..., Tensor]


def forward_variance(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Variance of q(x_t | x_s), s < t: sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 (Kingma et al. 2021, eq. 20); DDPM's beta_t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    return sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2


def q_posterior(schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and variance () or (B,) of q(x_s | x_t, x0), s < t (Ho et al. 2020, eq. 7; Kingma et al. 2021, eq. 25-26)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    beta = forward_variance(schedule, t, s)
    mean = expand(alpha_s * beta / sigma_t**2, x_t) * x0 + expand(alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, x_t) * x_t
    return mean, beta * (sigma_s / sigma_t) ** 2


def small(var_frac: Tensor | None, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Log of the posterior's own variance, -inf at s = 0 (Ho et al. 2020, section 3.2, beta tilde)."""
    (_, sigma_t), (_, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    return (forward_variance(schedule, t, s) * (sigma_s / sigma_t) ** 2).log()


def large(var_frac: Tensor | None, schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Log of the forward variance (Ho et al. 2020, section 3.2, beta)."""
    return forward_variance(schedule, t, s).log()
