"""Distillation: a student that a trained teacher shows where to go, in half the steps, in one, without a second evaluation, or smaller.

Each is an objective like any other: forward(denoiser, x0, cond, noise, batch) -> terms (B,), the denoiser being the student. The teacher
works in the same latents, under the same schedule, and is told all there is: no condition is dropped (training.cond_drop_prob=0).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoised, Denoiser, eps_at
from ldm.diffusion.guidance import denoise_pair
from ldm.diffusion.objective import denoising_terms, gaussian, l2
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.diffusion.times import Times
from ldm.diffusion.weighting import Weighting
from ldm.tensors import KeyedNoise, expand

ConditionPair = tuple[Condition, Condition]


class Teacher(nn.Module):
    """A trained model that says what it sees in a state, under guidance of its own.

    model: a LatentDiffusion, frozen here.  scale, interval: of classifier-free guidance, as guidance.cfg has them, for each row's t.
    """

    model: Any  # a module with condition, uncondition and denoiser

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
        """What it is told of a batch, and the null, for states like x."""
        return self.model.condition({**batch, "noise": noise}).to(x), self.model.null_condition(batch).to(x)

    @torch.no_grad()
    def forward(self, x_t: Tensor, t: Tensor, told: ConditionPair, scale: Tensor | None = None) -> Denoised:
        """Denoised at x_t (B, C, ...) and t (B,); scale: (B,) in place of its own."""
        cond, uncond = told
        if scale is None and self.scale == 1:
            return Denoised(*(one.to(x_t.dtype) for one in self.model.denoiser(x_t, t, cond)[:2]))
        lo, hi = self.interval
        scale = torch.where((t >= lo) & (t <= hi), self.scale if scale is None else scale, 1.0)
        with_it, without = denoise_pair(self.model.denoiser, cond.cat(uncond), x_t, t.repeat(2))
        x0, eps = (b.lerp(a, expand(scale.to(a), a)) for a, b in ((with_it.x0, without.x0), (with_it.eps, without.eps)))
        return Denoised(x0.to(x_t.dtype), eps.to(x_t.dtype))


class ProgressiveDistillation(nn.Module):
    """One step of the student to where two DDIM steps of the teacher lead (Salimans & Ho 2022, algorithm 2).

    steps: of the student, on the times 1/steps, 2/steps, ..., 1.  weighting, error: of x0, as Objective has them.
    """

    def __init__(
        self, teacher: Teacher, steps: int, weighting: Weighting, error: Callable[[Tensor, Tensor], Tensor] = l2
    ):
        super().__init__()
        self.teacher, self.steps, self.weighting, self.error = teacher, steps, weighting, error

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Terms (B,) for data x0 (B, C, ...): `loss`, `error` before weighting, `t`."""
        schedule, told = denoiser.schedule, self.teacher.conditions(batch, noise, x0)
        t, (middle, end) = grid(noise, x0, self.steps, (0.5, 1.0))
        x_t = sample_x_t(schedule, x0, t, noise)
        half = ddim_step(schedule, self.teacher(x_t, t, told), middle)
        whole = ddim_step(schedule, self.teacher(half, middle, told), end)
        wanted = ddim_target_x0(schedule, x_t, t, whole, end)
        return denoising_terms(
            denoiser, x_t, t, cond, wanted, eps_at(schedule, x_t, t, wanted), self.weighting, self.error
        )[0]


class ConsistencyDistillation(nn.Module):
    """The same x0 from two states of the teacher's trajectory (Song et al. 2023, algorithm 2; in latents, with guidance, Luo et al. 2023).

    The student's x0 is itself the consistency function, which at t = 0 is the state (cf. Lu & Song 2025, eq. 6).
    The nearer state is judged by the student without gradient, not by an average of it (Song & Dhariwal 2024, section 3.2).
    steps: DDIM steps of the teacher from noise to data.  weighting, error: of x0, as Objective has them.
    """

    def __init__(
        self, teacher: Teacher, steps: int, weighting: Weighting, error: Callable[[Tensor, Tensor], Tensor] = l2
    ):
        super().__init__()
        self.teacher, self.steps, self.weighting, self.error = teacher, steps, weighting, error

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Terms (B,) for data x0 (B, C, ...): `loss`, `error` before weighting, `t`."""
        schedule, told = denoiser.schedule, self.teacher.conditions(batch, noise, x0)
        t, (nearer,) = grid(noise, x0, self.steps, (1.0,))
        x_t = sample_x_t(schedule, x0, t, noise)
        x_s = ddim_step(schedule, self.teacher(x_t, t, told), nearer)
        with torch.no_grad():
            wanted = torch.where(expand(nearer > 0, x_s), denoiser(x_s, nearer, cond).x0, x_s)
        return denoising_terms(
            denoiser, x_t, t, cond, wanted, eps_at(schedule, x_t, t, wanted), self.weighting, self.error
        )[0]


class GuidanceDistillation(nn.Module):
    """What the teacher says at a guidance scale that the student is told, in one evaluation instead of two (Meng et al. 2023, eq. 4).

    scales: the (lowest, highest) of the uniform draw.  times, weighting, error, draw_eps: as Objective has them.
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
        """Terms (B,) for data x0 (B, C, ...): `loss`, `error` before weighting, `t`."""
        schedule, (lo, hi) = denoiser.schedule, self.scales
        t, scale = self.times(noise, x0, schedule), lo + (hi - lo) * noise.uniform("scale", x0.new_empty(len(x0)))
        x_t = sample_x_t(schedule, x0, t, noise, self.draw_eps)
        wanted = self.teacher(x_t, t, self.teacher.conditions(batch, noise, x0), scale)
        return denoising_terms(
            denoiser, x_t, t, replace(cond, scale=scale), wanted.x0, wanted.eps, self.weighting, self.error
        )[0]


class KnowledgeDistillation(nn.Module):
    """What the teacher says, `part` of the way from the data (Hinton et al. 2015): a smaller net taught by a bigger one.

    part: in [0, 1] of the loss; the rest is the denoising loss.  times, weighting, error, draw_eps: as Objective has them.
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
        """Terms (B,) for data x0 (B, C, ...): `loss`, `error` of the teacher's x0 before weighting, `t`."""
        schedule, t = denoiser.schedule, self.times(noise, x0, denoiser.schedule)
        eps = self.draw_eps(noise, x0)
        x_t = add_noise(schedule, x0, eps, t)
        seen = self.teacher(x_t, t, self.teacher.conditions(batch, noise, x0))
        between = (x0.lerp(seen.x0, self.part), eps.lerp(seen.eps, self.part))
        return denoising_terms(denoiser, x_t, t, cond, *between, self.weighting, self.error)[0]


def grid(noise: KeyedNoise, x0: Tensor, steps: int, back: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    """t (B,) on 1/steps, 2/steps, ..., 1, each alike, and the times that lie `back` steps nearer to the data."""
    i = (noise.uniform("t", x0.new_empty(len(x0), dtype=torch.float32)) * steps).floor() + 1
    return i / steps, [(i - one) / steps for one in back]


def sample_x_t(
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    noise: KeyedNoise,
    draw_eps: Callable[[KeyedNoise, Tensor], Tensor] = gaussian,
) -> Tensor:
    """alpha x0 + sigma eps at t (B,)."""
    return add_noise(schedule, x0, draw_eps(noise, x0), t)


def ddim_step(schedule: Schedule, seen: Denoised, s: Tensor) -> Tensor:
    """The state at s (B,) by DDIM: alpha x0 + sigma eps of what was seen (Song et al. 2021a, eq. 12 with eta = 0)."""
    return add_noise(schedule, seen.x0, seen.eps, s)


def ddim_target_x0(schedule: Schedule, x_t: Tensor, t: Tensor, x_s: Tensor, s: Tensor) -> Tensor:
    """The x0 with which one DDIM step from x_t at t (B,) comes to x_s at s (B,) (Salimans & Ho 2022, appendix G)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    ratio = sigma_s / sigma_t
    return (x_s - expand(ratio, x_t) * x_t) / expand(alpha_s - ratio * alpha_t, x_t)
