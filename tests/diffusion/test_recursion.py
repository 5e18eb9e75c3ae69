"""Every stochastic sampler equals the exact recursion of mean and variance of its steps, at finite n."""

import itertools
import math
from functools import partial

import pytest
import torch
from cases import F64
from oracle import Gaussian, affine
from steps import FOR_STUDENTS, ORDERED, STOCHASTIC, affine_step, coefficients, ddpm_step, euler_step, noised, recursion

from ldm.diffusion import correction, sampler, schedule

STEPS = STOCHASTIC | FOR_STUDENTS


@pytest.mark.parametrize("end", [0.0, 0.05])
@pytest.mark.parametrize("sched", ["linear", "cosine", "flow", "edm"])
@pytest.mark.parametrize("name", STEPS)
def test_sampler_mean_and_variance_are_exact(name, sched, end):
    run, step = STEPS[name]
    g = Gaussian(ORDERED[sched])
    ts = torch.tensor([0.95, 0.7, 0.4, 0.3, 0.1, end], dtype=F64)
    got = affine(run, g, g.schedule, ts, draws=5 if end else 4)
    assert got == pytest.approx(recursion(step(g, t, s) for t, s in itertools.pairwise(ts)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", STEPS)
def test_sampler_noise_is_added(name):
    """And not taken away, which has the same distribution but is another image."""
    run, step = STEPS[name]
    g, ts, x = Gaussian(schedule.cosine()), torch.tensor([0.7, 0.4], dtype=F64), torch.zeros(1, 1, dtype=F64)
    moved = run(g, g.schedule, x, ts, torch.ones_like) - run(g, g.schedule, x, ts, torch.zeros_like)
    assert float(moved) == pytest.approx(math.sqrt(step(g, *ts)[2]))


@pytest.mark.parametrize("sched", ["linear", "cosine", "flow", "edm"])
@pytest.mark.parametrize(("run", "second"), [(sampler.euler, False), (sampler.heun, True)])
def test_churn_matches_recursion(run, second, sched):
    g = Gaussian(ORDERED[sched])
    ts, within = torch.tensor([0.95, 0.7, 0.4, 0.3, 0.1, 0.0], dtype=F64), (0.2, 15.0)
    steps, draws = [], 0
    for t, s in itertools.pairwise(ts):
        alpha, sigma = g.schedule.alpha_sigma(t)
        if within[0] <= sigma / alpha <= within[1]:
            up, t = noised(g, t, 0.3)
            steps, draws = [*steps, up], draws + 1
        steps.append(euler_step(g, t, s, second))
    assert draws > 0
    got = affine(partial(run, s_churn=1.5, s_range=within), g, g.schedule, ts, draws)
    assert got == pytest.approx(recursion(steps), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("sched", ["linear", "cosine", "flow", "edm"])
def test_repaint_matches_recursion(sched):
    """Down by DDPM, up by q(x_t | x_s), along the walk."""
    g, ts = Gaussian(ORDERED[sched]), torch.tensor([0.95, 0.7, 0.4, 0.3, 0.1, 0.0], dtype=F64)
    walk, steps = correction.repaint_steps(5, jump=2, repeats=3), []
    for here, there in itertools.pairwise(walk):
        if there > here:
            steps.append(ddpm_step(False)(g, ts[here], ts[there]))
        else:
            a_t, s_t, a_s, s_s = coefficients(g.schedule, ts[there], ts[here])
            steps.append((a_t / a_s, 0.0, s_t**2 - (a_t / a_s * s_s) ** 2))
    got = affine(partial(correction.repaint, jump_length=2, num_resamples=3), g, g.schedule, ts, draws=len(steps) - 1)
    assert got == pytest.approx(recursion(steps), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("sched", ["linear", "cosine", "flow", "edm"])
def test_ddpm_is_ddim_at_eta_1(sched):
    g, ts = Gaussian(ORDERED[sched]), torch.linspace(0.99, 0, 8, dtype=F64)
    assert affine(sampler.ddpm, g, g.schedule, ts, 6) == pytest.approx(
        affine(partial(sampler.ddim, eta=1.0), g, g.schedule, ts, 6)
    )


def test_dpmpp_2m_sde_matches_paper_recursion():
    """Its own recursion (Lu et al. 2022b, eq. 18 and its two-step form), written with exponentials of h."""
    g = Gaussian(schedule.cosine())
    ts = torch.tensor([0.95, 0.7, 0.4, 0.3, 0.1, 0.0], dtype=F64)
    for eta in (0.0, 0.5, 1.0):
        x = torch.zeros(6, dtype=F64)
        x[0] = 1  # coefficients on (x, 1, z_1, ..., z_4)
        before = None
        for n, (t, s) in enumerate(itertools.pairwise(ts)):
            a_t, s_t, a_s, s_s = coefficients(g.schedule, t, s)
            slope, constant = affine_step(g, t, 1, 0, 0)
            x0 = slope * x
            x0[1] += constant
            if s == 0:
                x = x0
                break
            h = math.log(a_s / s_s) - math.log(a_t / s_t)
            D = x0 if before is None else x0 + h / before[1] / 2 * (x0 - before[0])
            x = s_s / s_t * math.exp(-eta * h) * x + a_s * (1 - math.exp(-h - eta * h)) * D
            x[2 + n] += s_s * math.sqrt(1 - math.exp(-2 * eta * h))
            before = x0, h
        got = affine(partial(sampler.dpmpp_2m, eta=eta), g, g.schedule, ts, draws=4 if eta else 0)
        assert got == pytest.approx((float(x[0]), float(x[1]), float(x[2:].norm())), rel=1e-9, abs=1e-12)
