"""Network + schedule + prediction = Denoiser: a state and a time in, estimates of the data and of the noise out."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.prediction import Prediction, solve
from ldm.diffusion.schedule import Schedule, widen
from ldm.errors import ConfigError
from ldm.tensors import at_least_float32, expand


class Denoised(NamedTuple):
    """Estimates at a state, (B, ...) each.

    var_frac: in [-1, 1], the learned variance's position in its range; None if not learned.
    """

    x0: Tensor
    eps: Tensor
    var_frac: Tensor | None = None


Denoise = Callable[[Tensor, Tensor], Denoised]


class Denoiser(nn.Module):
    """A network whose output is converted to x0 and eps by a schedule and a prediction.

    net: called as net(x, time, cond), x (B, C, ...), time (B,) = schedule.net_time(t); returns C channels, or 2 C with
    var_frac second.
    Raises ConfigError if the prediction does not determine x0 at t = 1.
    """

    def __init__(self, net: nn.Module, schedule: Schedule, prediction: Prediction):
        super().__init__()
        self.net, self.schedule, self.prediction = net, schedule, prediction
        alpha, sigma = schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
        a, b = prediction.coefficients(alpha, sigma)
        if (alpha * b - sigma * a).abs() < 1e-6:
            name = type(prediction).__name__
            raise ConfigError(
                f"prediction {name} does not determine x0 at t = 1 of this schedule, as eps cannot without signal; "
                "use v, flow or x0"
            )

    def output(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """Return the network's raw output and var_frac, at x_t (B, C, ...) and t () or (B,).

        The network's input has the dtype of x_t.
        """
        scale = self.prediction.input_scale(*self.schedule.alpha_sigma(t))
        out = self.net((expand(scale, x_t) * x_t).to(x_t.dtype), self.net_time(x_t, t), cond)
        if out.shape[1] == 2 * x_t.shape[1]:
            out, var_frac = out.chunk(2, dim=1)
            return out, var_frac
        return out, None

    def net_time(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the network's time (B,) for x_t (B, ...) and t () or (B,).

        At least float32, because 999 and 1000 are equal in bfloat16.
        """
        return self.schedule.net_time(t).to(x_t.device, at_least_float32(x_t.dtype)).expand(len(x_t))

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Denoised:
        """Return Denoised at x_t (B, C, ...) and t () or (B,) in (0, 1], rounded once to the dtype of x_t."""
        out, var_frac = self.output(x_t, t, cond)
        alpha, sigma = self.schedule.alpha_sigma(t)
        row = self.prediction.coefficients(alpha, sigma)
        x0, eps = solve(row, alpha, sigma, widen(x_t), widen(out))
        return Denoised(x0.to(x_t.dtype), eps.to(x_t.dtype), var_frac)


def eps_at(schedule: Schedule, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
    """Compute eps from x_t and x0: (x_t - alpha x0) / sigma, at t () or (B,) in (0, 1]."""
    alpha, sigma = schedule.alpha_sigma(t)
    return (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
