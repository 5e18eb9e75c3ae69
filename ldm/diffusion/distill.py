"""Distillation of a trained teacher into a student: fewer steps, one evaluation instead of two, or a smaller network.

Each is an objective like any other: forward(denoiser, x0, cond, noise, batch) -> terms (B,), the denoiser being the
student. The
teacher works in the same latents, under the same schedule, and gets every condition: none is dropped
(training.cond_drop_prob=0).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoised, Denoiser, eps_at
from ldm.diffusion.guidance import denoise_parts
from ldm.diffusion.objective import denoising_terms, gaussian, l2
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.diffusion.times import Times, uniform_draws
from ldm.diffusion.weighting import Weighting
from ldm.tensors import KeyedNoise, expand

ConditionPair = tuple[Condition, Condition]


class Teacher(nn.Module):
    """A frozen, trained model that denoises a state, with its own guidance scale.

    model: a LatentDiffusion, frozen here.  scale, interval: of classifier-free guidance, as in guidance.cfg, for each
    row's t.
    """

    model: Any  # a module with condition, null_condition and denoiser

    def __init__(self, model: nn.Module, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.scale, self.interval = scale, interval

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @property
    def schedule(self) -> Schedule:
        return self.model.denoiser.schedule

    @torch.no_grad()
    def conditions(self, batch: dict[str, Any], noise: KeyedNoise, x: Tensor) -> ConditionPair:
        """Return the condition of a batch and the null condition, in the dtype and on the device of x."""
        return self.model.condition({**batch, "noise": noise}).to(x), self.model.null_condition(batch).to(x)

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, conditions: ConditionPair, scale: Tensor | None = None) -> Denoised:
        """Return Denoised at x_t (B, C, ...) and t (B,); scale: (B,), overrides the teacher's scale."""
        cond, uncond = conditions
        if scale is None and self.scale == 1:
            return Denoised(*(estimate.to(x_t.dtype) for estimate in self.model.denoiser(x_t, t, cond)[:2]))
        lo, hi = self.interval
        scale = torch.where((t >= lo) & (t <= hi), self.scale if scale is None else scale, 1.0)
        conditional, unconditional = denoise_parts(self.model.denoiser, cond.cat(uncond), x_t, t.repeat(2))
        x0, eps = (
            b.lerp(a, expand(scale.to(a), a))
            for a, b in ((conditional.x0, unconditional.x0), (conditional.eps, unconditional.eps))
        )
        return Denoised(x0.to(x_t.dtype), eps.to(x_t.dtype))


class ProgressiveDistillation(nn.Module):
    """The objective that matches one student step to two DDIM steps of the teacher (Salimans & Ho 2022, algorithm 2).

    steps: number of student steps, on the times 1/steps, 2/steps, ..., 1.  weighting, error: of x0, as in Objective.
    """

    def __init__(
        self, teacher: Teacher, steps: int, weighting: Weighting, error: Callable[[Tensor, Tensor], Tensor] = l2
    ):
        super().__init__()
        self.teacher, self.steps, self.weighting, self.error = teacher, steps, weighting, error

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the terms (B,) for data x0 (B, C, ...): `loss`, `error` before weighting, `t`."""
        schedule, conditions = denoiser.schedule, self.teacher.conditions(batch, noise, x0)
        t, (middle, end) = grid(noise, x0, self.steps, (0.5, 1.0))
        x_t = sample_x_t(schedule, x0, t, noise)
        x_middle = ddim_step(schedule, self.teacher(x_t, t, conditions), middle)
        x_end = ddim_step(schedule, self.teacher(x_middle, middle, conditions), end)
        target = ddim_target_x0(schedule, x_t, t, x_end, end)
        return denoising_terms(
            denoiser, x_t, t, cond, target, eps_at(schedule, x_t, t, target), self.weighting, self.error
        )[0]


class ConsistencyDistillation(nn.Module):
    """The objective that makes x0 equal at two adjacent states of the teacher's trajectory.

    Song et al. 2023, algorithm 2; in latents and with guidance as in Luo et al. 2023.
    The student's x0 is itself the consistency function, which at t = 0 is the state (cf. Lu & Song 2025, eq. 6).
    At the state nearer to the data the student is evaluated without gradient, not its EMA (Song & Dhariwal 2024,
    section 3.2).
    steps: DDIM steps of the teacher from noise to data.  weighting, error: of x0, as in Objective.
    """

    def __init__(
        self, teacher: Teacher, steps: int, weighting: Weighting, error: Callable[[Tensor, Tensor], Tensor] = l2
    ):
        super().__init__()
        self.teacher, self.steps, self.weighting, self.error = teacher, steps, weighting, error

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the terms (B,) for data x0 (B, C, ...): `loss`, `error` before weighting, `t`."""
        schedule, conditions = denoiser.schedule, self.teacher.conditions(batch, noise, x0)
        t, (nearer,) = grid(noise, x0, self.steps, (1.0,))
        x_t = sample_x_t(schedule, x0, t, noise)
        x_s = ddim_step(schedule, self.teacher(x_t, t, conditions), nearer)
        with torch.no_grad():
            target = torch.where(expand(nearer > 0, x_s), denoiser(x_s, nearer, cond).x0, x_s)
        return denoising_terms(
            denoiser, x_t, t, cond, target, eps_at(schedule, x_t, t, target), self.weighting, self.error
        )[0]


class GuidanceDistillation(nn.Module):
    """The objective that distils guidance into one evaluation, conditioned on the scale (Meng et al. 2023, eq. 4).

    scales: the (lowest, highest) of the uniform draw.  timestep_sampling, weighting, error, noise: as in Objective.
    """

    def __init__(
        self,
        teacher: Teacher,
        timestep_sampling: Times,
        weighting: Weighting,
        scales: tuple[float, float] = (1.0, 6.0),
        error: Callable[[Tensor, Tensor], Tensor] = l2,
        noise: Callable[[KeyedNoise, Tensor], Tensor] = gaussian,
    ):
        super().__init__()
        self.teacher, self.times, self.weighting, self.scales = teacher, timestep_sampling, weighting, scales
        self.error, self.draw_eps = error, noise

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the terms (B,) for data x0 (B, C, ...): `loss`, `error` before weighting, `t`."""
        schedule, (lo, hi) = denoiser.schedule, self.scales
        t, scale = self.times(noise, x0, schedule), lo + (hi - lo) * noise.uniform("scale", x0.new_empty(len(x0)))
        x_t = sample_x_t(schedule, x0, t, noise, self.draw_eps)
        target = self.teacher(x_t, t, self.teacher.conditions(batch, noise, x0), scale)
        return denoising_terms(
            denoiser, x_t, t, replace(cond, scale=scale), target.x0, target.eps, self.weighting, self.error
        )[0]


class KnowledgeDistillation(nn.Module):
    """The objective that trains a smaller student on the teacher's estimates mixed with the data (Hinton et al. 2015).

    distill_weight: in [0, 1], the teacher's share of the target; the rest is the denoising loss.
    timestep_sampling, weighting, error, noise: as in Objective.
    """

    def __init__(
        self,
        teacher: Teacher,
        timestep_sampling: Times,
        weighting: Weighting,
        distill_weight: float = 0.5,
        error: Callable[[Tensor, Tensor], Tensor] = l2,
        noise: Callable[[KeyedNoise, Tensor], Tensor] = gaussian,
    ):
        super().__init__()
        self.teacher, self.times, self.weighting, self.part = teacher, timestep_sampling, weighting, distill_weight
        self.error, self.draw_eps = error, noise

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the terms (B,) for data x0 (B, C, ...): `loss`, `error` before weighting (on the mixed x0), `t`."""
        schedule, t = denoiser.schedule, self.times(noise, x0, denoiser.schedule)
        eps = self.draw_eps(noise, x0)
        x_t = add_noise(schedule, x0, eps, t)
        estimate = self.teacher(x_t, t, self.teacher.conditions(batch, noise, x0))
        target = (x0.lerp(estimate.x0, self.part), eps.lerp(estimate.eps, self.part))
        return denoising_terms(denoiser, x_t, t, cond, *target, self.weighting, self.error)[0]


def grid(noise: KeyedNoise, x0: Tensor, steps: int, back: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    """Draw t (B,) uniformly from 1/steps, 2/steps, ..., 1; return it and the times `back` steps nearer to the data."""
    i = (uniform_draws(noise, x0) * steps).floor() + 1
    return i / steps, [(i - k) / steps for k in back]


def sample_x_t(
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    noise: KeyedNoise,
    draw_eps: Callable[[KeyedNoise, Tensor], Tensor] = gaussian,
) -> Tensor:
    """Draw eps and return alpha x0 + sigma eps at t (B,)."""
    return add_noise(schedule, x0, draw_eps(noise, x0), t)


def ddim_step(schedule: Schedule, estimate: Denoised, s: Tensor) -> Tensor:
    """Return alpha x0 + sigma eps of an estimate at s (B,), a DDIM step (Song et al. 2021a, eq. 12 with eta = 0)."""
    return add_noise(schedule, estimate.x0, estimate.eps, s)


def ddim_target_x0(schedule: Schedule, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """Solve a DDIM step from x_t at t (B,) to x_s at s (B,) for its x0 (Salimans & Ho 2022, appendix G)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    ratio = sigma_s / sigma_t
    return (x_s - expand(ratio, x_t) * x_t) / expand(alpha_s - ratio * alpha_t, x_t)
