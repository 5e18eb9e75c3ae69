"""Training objectives: draw t and eps, compute x_t, compare the network's output with a x0 + b eps, weight the error.

Every objective has forward(denoiser, x0, cond, noise, batch) -> terms (B,), of which `loss` is minimised. Those that
consist of a draw and a loss expose both, `draw` and `loss_at`, so that other objectives can wrap them and a diagnostic
can evaluate a given t. An objective that reads pixels has keys = ("image",).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoised, Denoiser
from ldm.diffusion.grids import num_timesteps
from ldm.diffusion.prediction import output_gain, solve, target
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.diffusion.times import Times, uniform_draws
from ldm.diffusion.variance import Decoder, Variance, gaussian_nll, learned_range, vlb_term
from ldm.diffusion.weighting import Weighting
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise, mean_per_sample


def l2(out: Tensor, target: Tensor) -> Tensor:
    """Compute the squared error, element by element."""
    return (out - target) ** 2


def l1(out: Tensor, target: Tensor) -> Tensor:
    """Compute the absolute error, element by element."""
    return (out - target).abs()


def huber(out: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    """Compute half the squared error up to delta, linear beyond, element by element (Huber 1964)."""
    return huber_loss(out, target, reduction="none", delta=delta)


def gaussian(noise: KeyedNoise, x0: Tensor) -> Tensor:
    """Draw a standard normal eps (B, ...)."""
    return noise.normal("eps", x0)


def offset(noise: KeyedNoise, x0: Tensor, strength: float = 0.1) -> Tensor:
    """Draw eps (B, C, ...): a standard normal plus `strength` times one normal per channel.

    Guttenberg 2023, "Diffusion with offset noise".
    """
    channel = x0[(slice(None), slice(None), *(slice(0, 1),) * (x0.ndim - 2))]
    return noise.normal("eps", x0) + strength * noise.normal("offset", channel)


def nearest(noise: KeyedNoise, x0: Tensor, candidates: int = 4) -> Tensor:
    """Draw that of several standard normals eps (B, C, ...) which is nearest to x0, for each row on its own.

    Li et al. 2025, immiscible diffusion with k nearest noises.  candidates: how many are drawn.
    """
    drawn = torch.stack([noise.normal("eps" if i == 0 else f"eps/{i}", x0) for i in range(candidates)])
    distance = (drawn - x0).flatten(2).square().sum(2)  # (candidates, B)
    return drawn[distance.argmin(0), torch.arange(len(x0), device=x0.device)]


class Objective(nn.Module):
    """The denoising loss E_t,eps [w error(out, a x0 + b eps)].

    Ho et al. 2020, algorithm 1 and eq. 14; Kingma & Gao 2023, section 2.

    timestep_sampling: (noise, x0, schedule) -> t (B,).  weighting: weight on the error of x0.
    error: (out, target) -> elementwise error.  noise: (noise, x0) -> eps.
    vlb: weight of the bound in bits per dimension, 0.001 for a learned variance (Nichol & Dhariwal 2021, eq. 16); its
    gradient reaches only the variance.  decoder: the bound's term at t = 1/T, variance.decoder_nll for pixels.
    """

    def __init__(
        self,
        timestep_sampling: Times,
        weighting: Weighting,
        error: Callable[[Tensor, Tensor], Tensor] = l2,
        noise: Callable[[KeyedNoise, Tensor], Tensor] = gaussian,
        vlb: float = 0.0,
        decoder: Decoder = gaussian_nll,
    ):
        super().__init__()
        self.times, self.weighting, self.error, self.draw_eps, self.vlb, self.decoder = (
            timestep_sampling,
            weighting,
            error,
            noise,
            vlb,
            decoder,
        )

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Draw times and noise, and return the terms (B,) for data x0 (B, C, ...)."""
        return self.loss_at(denoiser, x0, cond, *self.draw(noise, x0, denoiser.schedule))

    def draw(self, noise: KeyedNoise, x0: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Draw a time t (B,) and eps (B, C, ...) for each row of x0."""
        return self.times(noise, x0, schedule), self.draw_eps(noise, x0)

    def loss_at(self, denoiser: Denoiser, x0: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Return the terms (B,) at the given t (B,) and eps.

        They are `loss`, `error` (before weighting), `t`, and `vlb` (bits per dimension) if it is added.
        """
        x_t = add_noise(denoiser.schedule, x0, eps, t)
        terms, out, var_frac = denoising_terms(denoiser, x_t, t, cond, x0, eps, self.weighting, self.error)
        if not self.vlb:
            return terms
        alpha, sigma = denoiser.schedule.alpha_sigma(t)
        estimate = Denoised(
            *solve(denoiser.prediction.coefficients(alpha, sigma), alpha, sigma, x_t, out.detach()), var_frac
        )
        bits = vlb_estimate(denoiser.schedule, x0, x_t, t, estimate, learned_range, self.decoder)
        return {**terms, "loss": terms["loss"] + self.vlb * bits, "vlb": bits}


def denoising_terms(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    cond: Condition,
    x0: Tensor,
    eps: Tensor,
    weighting: Weighting,
    error: Callable[[Tensor, Tensor], Tensor],
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """Compare the network's output at x_t (B, C, ...) and t (B,) with a x0 + b eps.

    Returns the terms (B,) `loss`, `error` (before weighting) and `t`, the output in x_t's dtype, and var_frac.
    """
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    row = denoiser.prediction.coefficients(alpha, sigma)
    out, var_frac = denoiser.output(x_t, t, cond)
    out = out.to(x_t.dtype)
    mean_error = mean_per_sample(error(out, target(row, x0, eps)))
    return (
        {
            "loss": weighting(alpha, sigma, row) / output_gain(row, alpha, sigma) * mean_error,
            "error": mean_error,
            "t": t,
        },
        out,
        var_frac,
    )


class VLBObjective(nn.Module):
    """The variational bound in bits per dimension, without its prior term.

    Nichol & Dhariwal 2021, L_vlb; Ho et al. 2020, eq. 5.

    timestep_sampling: must draw from the schedule's entries, as `discrete` does; best wrapped in LossSecondMoment.
    """

    def __init__(
        self,
        timestep_sampling: Times,
        noise: Callable[[KeyedNoise, Tensor], Tensor] = gaussian,
        variance: Variance = learned_range,
        decoder: Decoder = gaussian_nll,
    ):
        super().__init__()
        self.times, self.draw_eps, self.variance, self.decoder = timestep_sampling, noise, variance, decoder

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Draw times and noise, and return the terms (B,) for data x0 (B, C, ...)."""
        return self.loss_at(denoiser, x0, cond, *self.draw(noise, x0, denoiser.schedule))

    def draw(self, noise: KeyedNoise, x0: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Draw a time t (B,) and eps (B, C, ...) for each row of x0."""
        return self.times(noise, x0, schedule), self.draw_eps(noise, x0)

    def loss_at(self, denoiser: Denoiser, x0: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Return the terms (B,) at the given t (B,) and eps: `loss` and `t`."""
        x_t = add_noise(denoiser.schedule, x0, eps, t)
        return {
            "loss": vlb_estimate(denoiser.schedule, x0, x_t, t, denoiser(x_t, t, cond), self.variance, self.decoder),
            "t": t,
        }


def vlb_estimate(
    schedule: Schedule, x0: Tensor, x_t: Tensor, t: Tensor, estimate: Denoised, variance: Variance, decoder: Decoder
) -> Tensor:
    """Estimate the bound, in bits per dimension, from its term at each t (B,) in 1/T, 2/T, ..., 1.

    T times the term is an unbiased estimate of the bound.  Raises ConfigError for other times.
    """
    T = num_timesteps(schedule)
    i = (t.double() * T).round()
    if ((t * T - i).abs() > 0.01).any():
        raise ConfigError(
            f"the bound is a sum over the schedule's {T} entries and times lie between them; "
            "choose timestep_sampling=discrete"
        )
    return T * vlb_term(schedule, x0, x_t, i / T, (i - 1) / T, estimate, variance, decoder)


class LogVariance(nn.Module):
    """An objective's loss balanced over t by a learned log-variance u: loss / e^u + u.

    Rombach et al. 2022, their code; EDM2.
    T: number of bins of t, one u each.
    """

    def __init__(self, objective: Objective, T: int = 1000, init: float = 0.0):
        super().__init__()
        self.objective = objective
        self.log_variance = nn.Parameter(torch.full((T,), init))

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Draw times and noise, and return the terms (B,) for data x0 (B, C, ...)."""
        return self.loss_at(denoiser, x0, cond, *self.draw(noise, x0, denoiser.schedule))

    def draw(self, noise: KeyedNoise, x0: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Draw a time t (B,) and eps (B, C, ...) for each row of x0."""
        return self.objective.draw(noise, x0, schedule)

    def loss_at(self, denoiser: Denoiser, x0: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Return the wrapped objective's terms (B,) with `loss` balanced, and the original loss as `balanced`."""
        terms = self.objective.loss_at(denoiser, x0, cond, t, eps)
        u = self.log_variance[bin_of(t, len(self.log_variance))]
        return terms | {"loss": terms["loss"] / u.exp() + u, "balanced": terms["loss"]}


class LossSecondMoment(nn.Module):
    """An objective with t drawn in proportion to sqrt(E[loss^2]) and the loss divided by it.

    Nichol & Dhariwal 2021, eq. 18.
    history: number of losses stored per bin of t; until all T bins are full, t is uniform.  floor: the fraction of
    draws that stays uniform.
    The losses of all ranks are stored, so that all ranks draw from the same distribution. Raises ConfigError if T is
    not the schedule's.
    """

    losses: Tensor
    count: Tensor

    def __init__(self, objective: Objective, T: int = 1000, history: int = 10, floor: float = 0.001):
        super().__init__()
        self.objective, self.T, self.floor = objective, T, floor
        self.register_buffer("losses", torch.zeros(T, history), persistent=False)
        self.register_buffer("count", torch.zeros(T, dtype=torch.long), persistent=False)

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the wrapped objective's terms (B,), with `loss` unbiased for uniform t.

        In training mode the losses are stored.  Raises ConfigError if T is not the schedule's.
        """
        T = num_timesteps(denoiser.schedule)
        if T != self.T:
            raise ConfigError(
                f"the schedule has T = {T}, the objective T = {self.T}; set objective.T to the schedule's"
            )
        p = self.probabilities()
        u = uniform_draws(noise, x0)
        i = torch.searchsorted(p.cumsum(0), u.to(p), right=True)  # u is at most 1 - 2^-24, below the sum's last entry
        _, eps = self.objective.draw(noise, x0, denoiser.schedule)
        terms = self.objective.loss_at(denoiser, x0, cond, (i + 1).to(u) / self.T, eps)
        if self.training:
            self.update_history(i, terms["loss"].detach())
        return terms | {"loss": terms["loss"] / (self.T * p[i]).to(terms["loss"])}

    def probabilities(self) -> Tensor:
        """Return the probability p (T,), float64, of each bin."""
        rms = self.losses.double().square().mean(1).sqrt()
        p = (1 - self.floor) * rms / rms.sum().clamp(min=1e-30) + self.floor / self.T
        return torch.where((self.count >= self.losses.shape[1]).all(), p, torch.full_like(p, 1 / self.T))

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return the stored losses and their counts, which a resumed training needs."""
        return {"losses": self.losses, "count": self.count}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore the state that get_extra_state returned."""
        self.losses.copy_(state["losses"])
        self.count.copy_(state["count"])

    def update_history(self, i: Tensor, loss: Tensor) -> None:
        """Overwrite the oldest losses of bins i (B,) with losses (B,)."""
        i, order = gather(i).sort(stable=True)
        loss = gather(loss)[order]
        history = self.losses.shape[1]
        counts = torch.bincount(i, minlength=self.T)
        rank = torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[i]
        newest = rank >= counts[i] - history
        slot = (self.count[i] + rank) % history
        self.losses[i[newest], slot[newest]] = loss[newest].to(self.losses)
        self.count += counts


def gather(x: Tensor) -> Tensor:
    """Concatenate x (B,) of every rank, in the order of the ranks; in a single process return x."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    out = x.new_empty(torch.distributed.get_world_size() * len(x))
    torch.distributed.all_gather_into_tensor(out, x.contiguous())
    return out


def bin_of(t: Tensor, T: int) -> Tensor:
    """Return the index i of the bin (i/T, (i + 1)/T] that contains t (B,) in (0, 1].

    t = (i + 1)/T gives i whatever the rounding.
    """
    return ((t * T - 1e-3).ceil().long() - 1).clamp(min=0)
