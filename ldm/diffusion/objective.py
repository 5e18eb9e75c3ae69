"""What is minimised: draw t and eps, make x_t, compare the network's output with a x0 + b eps, weigh."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import gain, target
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import Times
from ldm.diffusion.weighting import Weighting
from ldm.tensors import Noise, expand, mean_per_sample


def l2(out: Tensor, wanted: Tensor) -> Tensor:
    """Squared error, element by element."""
    return (out - wanted) ** 2


def gaussian(noise: Noise, x0: Tensor) -> Tensor:
    """Standard normal eps (B, ...)."""
    return noise.normal("eps", x0)


class Objective(nn.Module):
    """The denoising loss E_t,eps [w error(out, a x0 + b eps)] (Ho et al. 2020, algorithm 1 and eq. 14; Kingma & Gao 2023, eq. 5).

    times: (noise, x0, schedule) -> t (B,).  weighting: weight on the error of x0.  error: (out, wanted) -> elementwise error.
    draw_eps: (noise, x0) -> eps.
    """

    def __init__(
        self,
        times: Times,
        weighting: Weighting,
        error: Callable[[Tensor, Tensor], Tensor] = l2,
        draw_eps: Callable[[Noise, Tensor], Tensor] = gaussian,
    ):
        super().__init__()
        self.times, self.weighting, self.error, self.draw_eps = times, weighting, error, draw_eps

    def forward(self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: Noise, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Terms (B,) for data x0 (B, C, ...), at times and noise drawn from `noise`; `loss` is the one to minimise."""
        return self.at(denoiser, x0, cond, *self.draw(noise, x0, denoiser.schedule))

    def draw(self, noise: Noise, x0: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """A time t (B,) and eps (B, C, ...) for each row of x0."""
        return self.times(noise, x0, schedule), self.draw_eps(noise, x0)

    def at(self, denoiser: Denoiser, x0: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """The terms (B,) at given t (B,) and eps: `loss`, and `error`, the same before weighting."""
        alpha, sigma = denoiser.schedule.alpha_sigma(t)
        row = denoiser.prediction.row(alpha, sigma)
        x_t = expand(alpha, x0) * x0 + expand(sigma, x0) * eps
        out, _ = denoiser.output(x_t, t, cond)
        error = mean_per_sample(self.error(out.to(x_t.dtype), target(row, x0, eps)))
        weight = self.weighting(alpha, sigma, row) / gain(row, alpha, sigma)
        return {"loss": weight * error, "error": error}
