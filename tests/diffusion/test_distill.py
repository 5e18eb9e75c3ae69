"""Distillation against exact teachers: those of Gaussian data, whose trajectories, consistency function and guidance
are known.
"""

from functools import partial

import pytest
import torch
from cases import F64, SCHEDULES, f64
from oracle import Gaussian
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import distill, guidance, objective, prediction, sampler, schedule, times, weighting
from ldm.diffusion.denoiser import Denoised, Denoiser, eps_at
from ldm.diffusion.distill import (
    ConsistencyDistillation,
    GuidanceDistillation,
    KnowledgeDistillation,
    ProgressiveDistillation,
    Teacher,
)
from ldm.tensors import KeyedNoise, expand

NOISE = KeyedNoise(0, range(64))
VP, COSINE = schedule.VP(), schedule.cosine()
DISCRETE = partial(times.independent, density=times.discrete)


class Known(nn.Module):
    """A model of Gaussian data whose mean a condition's vector moves; with vector 0 it is untold."""

    def __init__(self, sched=VP, mean=0.6, std=0.35):
        super().__init__()
        self.schedule, self.mean, self.std = sched, mean, std
        self.denoiser = self.exact
        self.exact.__func__.schedule = sched

    def exact(self, x_t, t, cond):
        seen = Gaussian(self.schedule, 0.0, self.std)
        alpha, _ = self.schedule.alpha_sigma(t)
        mean = cond.vector[:, :1].to(x_t)
        x0, eps, _ = seen(x_t - expand(alpha, x_t) * mean, t)
        return type(seen(x_t, t))(x0 + mean, eps)

    def condition(self, batch):
        return Condition(vector=torch.full((64, 1), self.mean, dtype=F64))

    def null_condition(self, batch):
        return Condition(vector=torch.zeros(64, 1, dtype=F64))


class Constant(nn.Module):
    """A network that answers one number everywhere, and may be told a scale."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value), dtype=F64))

    def forward(self, x, time, cond):
        return self.value.expand_as(x) if cond.scale is None else self.value + 0 * x + cond.scale[:, None]


def student(value=0.0, pred=None, sched=VP):
    return Denoiser(Constant(value), sched, pred or prediction.X0())


def data():
    return 0.6 + 0.35 * torch.randn(64, 5, dtype=F64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["cosine", "vp", "flow"])
def test_ddim_target_x0_inverts_ddim_step(name):
    sched, x_t, x_s, t, s = SCHEDULES[name], data()[:3], data()[3:6], f64(0.9, 0.5, 0.1), f64(0.8, 0.25, 0.0)
    x0 = distill.ddim_target_x0(sched, x_t, t, x_s, s)
    eps = eps_at(sched, x_t, t, x0)
    alpha, sigma = (c[:, None] for c in sched.alpha_sigma(s))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_s)
    alpha, sigma = (c[:, None] for c in sched.alpha_sigma(t))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x_t)


def test_progressive_target_is_two_teacher_steps():
    """The error of a student that answers 0 is the wanted x0 squared, and DDIM's own two steps from x_t end where it
    points.
    """
    found = ProgressiveDistillation(Teacher(Known()), 4, weighting.x0)(student(), data(), Condition(), NOISE, {})
    assert set(found["t"].tolist()) == {0.25, 0.5, 0.75, 1.0}
    eps = NOISE.normal("eps", data())
    for row in range(0, 64, 9):
        t = found["t"][row].double()
        x_t = distill.sample_x_t(VP, data()[row : row + 1], t[None], KeyedNoise(0, [row]))
        torch.testing.assert_close(
            x_t, VP.alpha_sigma(t)[0] * data()[row] + VP.alpha_sigma(t)[1] * eps[row : row + 1], rtol=1e-5, atol=1e-5
        )
        end = sampler.ddim(Gaussian(VP), VP, x_t, torch.stack([t, t - 0.125, t - 0.25]), lambda x: x)
        x0 = distill.ddim_target_x0(VP, x_t, t[None], end, t[None] - 0.25)
        torch.testing.assert_close(found["error"][row], x0.square().mean(), rtol=1e-4, atol=1e-5)


def test_distillation_loss_is_zero_for_perfect_student():
    """x0 of data without spread is the mean for teacher and student alike, at every step."""
    sharp = Teacher(Known(std=0.0))
    at = student(0.6)
    for made in (ProgressiveDistillation(sharp, 4, weighting.x0), ConsistencyDistillation(sharp, 4, weighting.x0)):
        assert made(at, data(), Condition(), NOISE, {})["loss"].abs().max() < 1e-5
        assert made(student(0.5), data(), Condition(), NOISE, {})["loss"].mean() > 1e-3


def test_consistency_loss_is_weighted_near_data():
    plain, weighted = (
        ConsistencyDistillation(Teacher(Known()), 8, way)(student(0.5), data(), Condition(), NOISE, {})
        for way in (weighting.x0, weighting.v)
    )
    _, sigma = VP.alpha_sigma(plain["t"])
    torch.testing.assert_close(weighted["loss"], plain["loss"] / sigma**2, rtol=1e-4, atol=1e-7)


class Solved(nn.Module):
    """x0 by the exact flow to the data: the consistency function itself, as the network of an x0-prediction."""

    def __init__(self, drift=0.0):
        super().__init__()
        self.known, self.drift = Gaussian(VP), drift

    def forward(self, x, time, cond):
        t = (time / VP.net_time(torch.ones(()))).to(x)[:, None]
        mean, variance = self.known.moments(t)
        return self.known.mean + (1 + self.drift * t) * self.known.std / variance.sqrt() * (x - mean)


def test_consistency_target_has_no_gradient():
    recorded = []

    class Recorded(Constant):
        def forward(self, x, time, cond):
            recorded.append(torch.is_grad_enabled())
            return super().forward(x, time, cond)

    made = ConsistencyDistillation(Teacher(Known()), 4, weighting.x0)
    made(Denoiser(Recorded(), VP, prediction.X0()), data(), Condition(), NOISE, {})
    assert recorded == [False, True]


def test_consistency_loss_of_exact_function_falls_with_step_squared():
    """Which falls with the square of its length; that of one which drifts is larger."""

    def loss(steps, drift=0.0):
        at = Denoiser(Solved(drift), VP, prediction.X0())
        return (
            ConsistencyDistillation(Teacher(Known()), steps, weighting.x0, objective.l1)(
                at, data(), Condition(), NOISE, {}
            )["loss"]
            .mean()
            .item()
        )

    assert loss(10) > 3 * loss(20) > 9 * loss(40)
    assert loss(40, drift=0.5) > 5 * loss(40)


def test_consistency_sampling_with_exact_function_gives_data():
    known = Gaussian(VP)

    def denoise(x, t):
        return known(x, t)._replace(x0=known.flow(x, t, torch.zeros_like(t)))

    draws = torch.Generator().manual_seed(0)
    start = torch.randn(200_000, 1, dtype=F64, generator=draws)
    for ts in (f64(1, 0), f64(1, 0.5, 0)):
        image = sampler.consistency(denoise, VP, start, ts, lambda x: torch.randn(x.shape, dtype=F64, generator=draws))
        assert image.mean().item() == pytest.approx(0.6, abs=0.01)
        assert image.std().item() == pytest.approx(0.35, abs=0.01)


def test_consistency_sampling_adds_noise_of_next_time():
    states, noise = [], [f64(0.3, -2.0)[:, None], f64(1.5, 0.2)[:, None]]

    def denoise(x, t):
        states.append(x)
        return Gaussian(VP)(x, t)._replace(x0=torch.full_like(x, 0.7))

    draws = iter(noise)
    sampler.consistency(denoise, VP, torch.zeros(2, 1, dtype=F64), f64(1, 0.6, 0.2, 0), lambda x: next(draws))
    for state, t, eps in zip(states[1:], f64(0.6, 0.2), noise, strict=True):
        alpha, sigma = VP.alpha_sigma(t)
        torch.testing.assert_close(state, 0.7 * alpha + sigma * eps)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_teacher_guides_each_row_like_sampling(interval):
    model = Known()
    told = (model.condition({}), model.null_condition({}))
    t = torch.linspace(0.1, 0.9, 64, dtype=F64)
    seen = Teacher(model, 3.0, interval)(data(), t, told)
    for row in (0, 20, 40, 63):
        cond, uncond = (one.index([row]) for one in told)
        denoise = guidance.cfg(model.denoiser, cond, uncond, 3.0, interval)
        want = denoise(data()[row : row + 1], t[row])
        torch.testing.assert_close(seen.x0[row : row + 1], want.x0)
        torch.testing.assert_close(seen.eps[row : row + 1], want.eps)


def test_guidance_distillation_trains_student_on_its_scale():
    """For data without spread the guided x0 is scale x mean, so a student that answers its scale times the mean has no
    loss.
    """

    scales = []

    class Answers(nn.Module):
        def forward(self, x, time, cond):
            scales.append(cond.scale)
            return 0.6 * cond.scale.to(x)[:, None] + 0 * x

    teach = Teacher(Known(std=0.0))
    made = GuidanceDistillation(teach, DISCRETE, weighting.x0, (1.0, 5.0))
    assert made(Denoiser(Answers(), COSINE, prediction.X0()), data(), Condition(), NOISE, {})["loss"].max() < 1e-5
    assert made(student(0.6, sched=COSINE), data(), Condition(), NOISE, {})["loss"].mean() > 0.1
    torch.testing.assert_close(scales[0], 1 + 4 * NOISE.uniform("scale", torch.empty(64, dtype=F64)))


def test_knowledge_distillation_interpolates_data_and_teacher():
    x0, made = data(), partial(KnowledgeDistillation, Teacher(Known(std=0.0)), DISCRETE, weighting.x0)
    plain = objective.Objective(DISCRETE, weighting.x0)(student(0.2, sched=COSINE), x0, Condition(), NOISE, {})
    torch.testing.assert_close(
        made(distill_weight=0.0)(student(0.2, sched=COSINE), x0, Condition(), NOISE, {})["loss"], plain["loss"]
    )
    assert made(distill_weight=1.0)(student(0.6, sched=COSINE), x0, Condition(), NOISE, {})["loss"].max() < 1e-10


def test_teacher_stays_frozen_in_eval_mode():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.denoiser = student()

    model = Model()
    teach = Teacher(model)
    assert not any(p.requires_grad for p in teach.parameters())
    assert not teach.train().training
    assert not model.training


def test_guidance_embedded_is_one_evaluation():
    seen = guidance.guidance_embedded(student(pred=prediction.X0()), Condition(), None, 4.0)(data(), f64(0.5)[0])
    torch.testing.assert_close(seen.x0, torch.full_like(seen.x0, 4.0))


@pytest.mark.parametrize(("gamma", "same"), [(0.0, sampler.ddim), (1.0, sampler.consistency)])
def test_trajectory_consistency_sampling_is_ddim_and_consistency_sampling_at_its_ends(gamma, same):
    def denoise(x, t):
        return Denoised(x.sin() + t, (x - x.sin()).cos())

    ts, x = f64(1, 0.6, 0.2, 0), torch.linspace(-2, 2, 8, dtype=F64).view(2, 4)
    got, want = (one(denoise, VP, x, ts, torch.ones_like) for one in (partial(sampler.tcd, gamma=gamma), same))
    torch.testing.assert_close(got, want)


def test_trajectory_consistency_sampling_goes_below_and_back_up():
    x0, eps = f64(0.3, -0.2)[None], f64(1.1, 0.4)[None]
    got = sampler.tcd(lambda x, t: Denoised(x0, eps), VP, x0, f64(0.9, 0.5), lambda x: f64(0.7, 0.9)[None], gamma=0.4)
    (alpha, sigma), (low_alpha, low_sigma) = VP.alpha_sigma(f64(0.5)), VP.alpha_sigma(f64(0.3))
    factor = alpha / low_alpha
    spread = (sigma**2 - (factor * low_sigma) ** 2).sqrt()
    torch.testing.assert_close(got, factor * (low_alpha * x0 + low_sigma * eps) + spread * f64(0.7, 0.9))
