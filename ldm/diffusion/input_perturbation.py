"""Input perturbation: the network sees a noisier state than the one whose noise it is to predict."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Prediction
from ldm.diffusion.schedule import Schedule
from ldm.tensors import KeyedNoise, expand


@dataclass(frozen=True)
class PerturbedInput:
    """A Denoiser whose input x_t has sigma(t) `perturbation` added; an objective needs no more of one than this has."""

    denoiser: Denoiser
    perturbation: Tensor  # (B, C, ...)

    @property
    def schedule(self) -> Schedule:
        return self.denoiser.schedule

    @property
    def prediction(self) -> Prediction:
        return self.denoiser.prediction

    def output(self, x_t: Tensor, t: Tensor, cond: Condition) -> tuple[Tensor, Tensor | None]:
        """Return the network's raw output and var_frac at the noisier state."""
        sigma = self.schedule.alpha_sigma(t)[1]
        return self.denoiser.output((x_t + expand(sigma, x_t) * self.perturbation).to(x_t.dtype), t, cond)


class InputPerturbation(nn.Module):
    """An objective whose network sees alpha x0 + sigma (eps + gamma xi), xi standard normal, and is to predict eps.

    Ning et al. 2023, algorithm 1: the errors of earlier steps of sampling are imitated.
    gamma: strength.
    """

    def __init__(self, objective: Objective, gamma: float = 0.1):
        super().__init__()
        self.objective, self.gamma = objective, gamma

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Draw times and noise, and return the terms (B,) for data x0 (B, C, ...)."""
        perturbed: Any = PerturbedInput(denoiser, self.gamma * noise.normal("input_perturbation", x0))
        return self.objective.loss_at(perturbed, x0, cond, *self.draw(noise, x0, denoiser.schedule))

    def draw(self, noise: KeyedNoise, x0: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """Draw a time t (B,) and eps (B, C, ...) for each row of x0."""
        return self.objective.draw(noise, x0, schedule)

    def loss_at(self, denoiser: Denoiser, x0: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """Return the terms (B,) at the given t (B,) and eps, without perturbation."""
        return self.objective.loss_at(denoiser, x0, cond, t, eps)
