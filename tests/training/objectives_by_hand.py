"""The training objectives in plain tensors: terms (B,), and the derivative of the mean loss by the network's output."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import linear_model as linear
import torch
from formulas import SCHEDULES, Path, draw, expand, gain, input_factor, output_of, times, weight, x0_of
from torch import Tensor

HUBER, STRENGTH, VLB_WEIGHT, CANDIDATES, PERTURBATION = 0.3, 0.2, 0.01, 3, 0.25
ERRORS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {  # the error and its derivative
    "l2": lambda d: (d**2, 2 * d),
    "l1": lambda d: (d.abs(), d.sign()),
    "huber": lambda d: (
        torch.where(d.abs() <= HUBER, d**2 / 2, HUBER * (d.abs() - HUBER / 2)),
        d.clamp(-HUBER, HUBER),
    ),
}
PATHS: dict[str, Path] = {}


@dataclass(frozen=True)
class Setting:
    """The options of a diffusion training, by the names of conf/."""

    schedule: str = "cosine"
    prediction: str = "v"
    weighting: str = "v"
    times: str = "stratified"
    error: str = "l2"
    noise: str = "gaussian"
    kind: str = "label"
    drop: float = linear.DROP

    @property
    def path(self) -> Path:
        if self.schedule not in PATHS:
            PATHS[self.schedule] = SCHEDULES[self.schedule]()
        return PATHS[self.schedule]

    def draw_times(self, batch: dict[str, Any]) -> Tensor:
        return times(self.times, self.path, linear.SEED, batch["rows"], batch["position"], 4)

    def draw_eps(self, batch: dict[str, Any], z: Tensor) -> Tensor:
        shape = z.shape[1:]
        eps = draw(torch.randn, linear.SEED, "eps", batch["rows"], shape)
        if self.noise == "nearest":
            drawn = [eps, *(draw(torch.randn, linear.SEED, f"eps/{i}", batch["rows"], shape) for i in (1, 2))]
            rows = zip(*drawn, z, strict=True)
            return torch.stack([min(some, key=lambda one, x=x: float((one - x).norm())) for *some, x in rows])
        if self.noise == "offset":
            eps = eps + STRENGTH * draw(torch.randn, linear.SEED, "offset", batch["rows"], (shape[0], 1, 1))
        return eps


@dataclass
class Result:
    """terms: (B,) each, with `loss` and `t`.  slope: d mean(loss) / d output at x and time under `cond`.

    others: gradients of weights outside the model.  mixed: as in linear_model.gradients.
    """

    terms: dict[str, Tensor]
    slope: Tensor
    x: Tensor
    time: Tensor
    cond: linear.Inputs
    others: dict[str, Tensor] = field(default_factory=dict)
    mixed: Tensor | float = 0.0


Objective = Callable[[Setting, dict[str, Tensor], dict[str, Any], Tensor, linear.Inputs], Result]


def step_of(setting: Setting, objective: Objective):
    """Return the function (weights, batch) -> terms and gradients of a training step."""

    def gradients_of(weights: dict[str, Tensor], batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        z = linear.latent(weights, batch)
        cond = linear.condition(setting.kind, weights, batch, setting.drop)
        result = objective(setting, weights, batch, z, cond)
        by_weight = linear.gradients(weights, result.x, result.time, result.cond, result.slope, result.mixed)
        return result.terms, by_weight | result.others

    return gradients_of


def evaluate(s: Setting, weights: dict[str, Tensor], x_t: Tensor, t: Tensor, cond: linear.Inputs, prefix=linear.NET):
    """Return the network's input, its time and its output at x_t and t."""
    x = expand(input_factor(s.prediction, *s.path.alpha_sigma(t))) * x_t
    time = s.path.net_time(t)
    return x, time, linear.output(weights, x, time, cond, prefix)


def regression(s: Setting, weights, x_t: Tensor, t: Tensor, cond: linear.Inputs, x0: Tensor, eps: Tensor) -> Result:
    """Compare the output at x_t with that of x0 and eps."""
    x, time, out = evaluate(s, weights, x_t, t, cond)
    return Result(*compare(s, t, out, x0, eps), x, time, cond)


def compare(s: Setting, t: Tensor, out: Tensor, x0: Tensor, eps: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the terms (B,), with the weighted mean error of each row, and the mean loss's derivative by the output."""
    alpha, sigma = s.path.alpha_sigma(t)
    error, slope = ERRORS[s.error](out[:, : linear.CHANNELS] - output_of(s.prediction, alpha, sigma, x0, eps))
    factor = weight(s.weighting, s.prediction, s.path, t) / gain(s.prediction, alpha, sigma)
    mean = error.mean((1, 2, 3))
    by_output = torch.zeros_like(out)
    by_output[:, : linear.CHANNELS] = expand(factor) * slope / error.numel()
    return {"loss": factor * mean, "error": mean, "t": t}, by_output


def denoising(s: Setting, weights, batch, z, cond) -> Result:
    """Ho et al. 2020, algorithm 1."""
    t, eps = s.draw_times(batch), s.draw_eps(batch, z)
    return regression(s, weights, s.path.noised(z, eps, t), t, cond, z, eps)


def with_perturbed_input(s: Setting, weights, batch, z, cond) -> Result:
    """Ning et al. 2023, algorithm 1."""
    t, eps = s.draw_times(batch), s.draw_eps(batch, z)
    more = draw(torch.randn, linear.SEED, "input_perturbation", batch["rows"], z.shape[1:])
    return regression(s, weights, s.path.noised(z, eps + PERTURBATION * more, t), t, cond, z, eps)


def bound(s: Setting, z: Tensor, x_t: Tensor, t: Tensor, x0: Tensor, fraction: Tensor):
    """Return T times the bound's term at t in bits per dimension (B,), its slopes by x0's estimate and by `fraction`.

    Nichol & Dhariwal 2021, eq. 15, in the notation of Ho et al. 2020, eq. 6-7; the decoder is a Gaussian density.
    """
    T = s.path.steps
    i = (t * T).round().long()  # 1, ..., T
    bar = torch.cat([torch.ones(1, dtype=torch.float64), s.path.alpha_bar])
    beta = 1 - bar[1:] / bar[:-1]
    posterior = beta * (1 - bar[:-1]) / (1 - bar[1:])
    posterior[0] = posterior[1]  # clipped, as that of i = 1 is 0
    bar_i, bar_before, beta_i, small = bar[i], bar[i - 1], beta[i - 1], posterior[i - 1]
    of_x0 = expand(bar_before.sqrt() * beta_i / (1 - bar_i))
    of_x_t = expand((1 - beta_i).sqrt() * (1 - bar_before) / (1 - bar_i))
    share = (fraction + 1) / 2
    span = expand(beta_i.log() - small.log())
    log_p = expand(small.log()) + share * span
    delta = of_x0 * (x0 - z)  # mean of p minus mean of q
    miss = of_x0 * x0 + of_x_t * x_t - z  # mean of p minus data
    var_q, first = expand(small), expand(i == 1)
    kl = (log_p - var_q.log() + (var_q + delta**2) / log_p.exp() - 1) / 2
    nll = (math.log(2 * math.pi) + log_p + miss**2 / log_p.exp()) / 2
    scale = T / math.log(2)
    by_mean = torch.where(first, miss, delta) / log_p.exp()
    by_log = (1 - torch.where(first, miss**2, var_q + delta**2) / log_p.exp()) / 2
    bits = scale * torch.where(first, nll, kl).mean((1, 2, 3))
    return bits, scale * by_mean * of_x0 / z.numel(), scale * by_log * span / 2 / z.numel()


def hybrid(s: Setting, weights, batch, z, cond) -> Result:
    """Nichol & Dhariwal 2021, eq. 16: the error trains the mean, the bound the variance alone."""
    result = denoising(s, weights, batch, z, cond)
    t, eps = result.terms["t"], s.draw_eps(batch, z)
    x_t, out = s.path.noised(z, eps, t), evaluate(s, weights, s.path.noised(z, eps, t), t, cond)[2]
    mean, fraction = out.chunk(2, dim=1)
    x0, _ = x0_of(s.prediction, *s.path.alpha_sigma(t), x_t, mean)
    bits, _, by_fraction = bound(s, z, x_t, t, x0, fraction)
    result.slope[:, linear.CHANNELS :] = VLB_WEIGHT * by_fraction
    terms = {**result.terms, "loss": result.terms["loss"] + VLB_WEIGHT * bits, "vlb": bits}
    return replace(result, terms=terms)


def variational(s: Setting, weights, batch, z, cond, t: Tensor) -> Result:
    """Nichol & Dhariwal 2021, L_vlb at t."""
    x_t = s.path.noised(z, s.draw_eps(batch, z), t)
    x, time, out = evaluate(s, weights, x_t, t, cond)
    mean, fraction = out.chunk(2, dim=1)
    x0, by_output = x0_of(s.prediction, *s.path.alpha_sigma(t), x_t, mean)
    bits, by_x0, by_fraction = bound(s, z, x_t, t, x0, fraction)
    return Result({"loss": bits, "t": t}, torch.cat([by_x0 * by_output, by_fraction], 1), x, time, cond)


def importance_sampled(history: int, floor: float) -> Objective:
    """Nichol & Dhariwal 2021, eq. 18: times in proportion to the root mean square of the latest losses."""
    losses: dict[int, list[float]] = {}

    def objective(s: Setting, weights, batch, z, cond) -> Result:
        T = s.path.steps
        p = torch.full((T,), 1 / T, dtype=torch.float64)
        if all(len(losses.get(i, ())) == history for i in range(T)):
            squares = [sum(x * x for x in losses[i]) / history for i in range(T)]
            rms = torch.tensor(squares, dtype=torch.float64).sqrt()
            p = (1 - floor) * rms / rms.sum() + floor / T
        u = draw(torch.rand, linear.SEED, "t", batch["rows"])
        i = torch.tensor([int((p.cumsum(0) <= value).sum()) for value in u])
        result = variational(s, weights, batch, z, cond, (i + 1).double() / T)
        for index, loss in zip(i.tolist(), result.terms["loss"].tolist(), strict=True):
            losses[index] = [*losses.get(index, []), loss][-history:]
        factor = 1 / (T * p[i])
        terms = {**result.terms, "loss": factor * result.terms["loss"]}
        return replace(result, terms=terms, slope=expand(factor) * result.slope)

    return objective


def balanced(bins: int) -> Objective:
    """Divide the loss by e^u and add u, learned for each of `bins` equal parts of (0, 1]."""

    def objective(s: Setting, weights, batch, z, cond) -> Result:
        result = denoising(s, weights, batch, z, cond)
        loss, t = result.terms["loss"], result.terms["t"]
        u, i = weights["objective.log_variance"], (t * bins - 1e-3).ceil().long() - 1
        scale = (-u[i]).exp()
        by_u = torch.zeros_like(u).index_add(0, i, (1 - loss * scale) / len(t))
        terms = {**result.terms, "loss": loss * scale + u[i], "balanced": loss}
        return replace(result, terms=terms, slope=expand(scale) * result.slope, others={"objective.log_variance": by_u})

    return objective


def prior_preserving(prior: int, factor: float) -> Objective:
    """Ruiz et al. 2023, eq. 2: the mean loss of the instance's rows plus `factor` times that of the prior's."""

    def objective(s: Setting, weights, batch, z, cond) -> Result:
        result = denoising(s, weights, batch, z, cond)
        is_prior = batch["label"] == prior
        number = len(is_prior)
        shares = torch.zeros(number, dtype=torch.float64)
        shares[is_prior] = factor * number / max(int(is_prior.sum()), 1)
        shares[~is_prior] = number / max(int((~is_prior).sum()), 1)
        terms = {**result.terms, "loss": shares * result.terms["loss"]}
        return replace(result, terms=terms, slope=expand(shares) * result.slope)

    return objective
