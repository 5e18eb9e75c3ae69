from functools import partial
from types import SimpleNamespace

import pytest
import torch
from cases import F64, SCHEDULES, SHAPES, f64
from oracle import Gaussian, affine

from ldm.diffusion import constraint, correction, grids, sampler, schedule, variance
from ldm.diffusion.denoiser import Denoised

T = f64(0.6)[0]


def wide(schedule):
    """An estimate with values well outside [-1, 1]."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        x0 = 3 * x.sin() + 1
        return Denoised(x0, (x - alpha * x0) / sigma, torch.full_like(x, 0.3))

    return denoise


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["cosine", "flow", "edm"])
def test_constraint_changes_x0_and_preserves_x_t(name, shape):
    sched = SCHEDULES[name]
    x = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    known = torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(x[0].numel()).reshape(shape[1:]) % 2 == 0
    plain = wide(sched)(x, T)
    s = plain.x0.abs().flatten(1).quantile(0.9, dim=1).clamp(min=1).view(-1, *[1] * (x.ndim - 1))
    for changed, want in [
        (constraint.keep_known(wide(sched), sched, mask, known), torch.where(mask, known, plain.x0)),
        (constraint.keep_known(wide(sched), sched, mask.double(), known), torch.where(mask, known, plain.x0)),
        (constraint.clip(wide(sched), sched), plain.x0.clamp(-1, 1)),
        (constraint.clip(wide(sched), sched, -0.5, 2.0), plain.x0.clamp(-0.5, 2.0)),
        (constraint.dynamic_threshold(wide(sched), sched, quantile=0.9), plain.x0.clamp(-s, s) / s),
    ]:
        got = changed(x, T)
        assert torch.allclose(got.x0, want)
        assert torch.equal(got.var_frac, plain.var_frac)
        alpha, sigma = sched.alpha_sigma(T)
        assert torch.allclose(alpha * got.x0 + sigma * got.eps, x)


def test_dynamic_threshold_preserves_values_in_bounds():
    x = torch.linspace(-0.2, 0.2, 12, dtype=F64).view(2, 6)
    calm = lambda x, t: Denoised(x, x)  # noqa: E731
    assert torch.equal(constraint.dynamic_threshold(calm, schedule.cosine())(x, T).x0, x)
    assert torch.allclose(constraint.dynamic_threshold(calm, schedule.cosine(), 1.0, bound=0.1)(x, T).x0[0], x[0] / 2)


@pytest.mark.parametrize("mask", [torch.ones(2, 3, 4), torch.ones(5, 1, 2, 2), torch.ones(3, 1, 4, 4, 1)])
def test_keep_known_rejects_mask_of_wrong_shape(mask):
    with pytest.raises(ValueError, match=r"the mask \(.*\) does not fit x0 \(3, 2, 4, 4\); give it one channel"):
        constraint.keep_known(wide(schedule.cosine()), schedule.cosine(), mask, torch.zeros(3, 2, 4, 4))


@pytest.mark.parametrize("run", [sampler.ddim, sampler.heun, sampler.dpmpp_2m, sampler.ddpm, correction.repaint])
def test_keep_known_restores_known_part(run):
    sched = schedule.cosine()
    known, mask = torch.full((4, 2), 0.25, dtype=F64), torch.tensor([True, False])
    generator = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, dtype=F64, generator=generator)  # noqa: E731
    denoise = constraint.keep_known(Gaussian(sched), sched, mask, known)
    got = run(denoise, sched, noise(known), grids.trailing(sched, 20), noise)
    assert torch.allclose(got[:, 0], known[:, 0])
    assert not torch.isclose(got[:, 1], known[:, 1]).any()


def test_constrained_guidance_constrains_guided_x0():
    sched, x = schedule.cosine(), torch.linspace(-2, 2, 12, dtype=F64).view(3, 4)
    denoiser = SimpleNamespace(schedule=sched)

    def guidance(denoiser, cond, uncond, scale):
        assert (cond, uncond, scale) == ("cond", "uncond", 7.0)
        return wide(denoiser.schedule)

    got = constraint.constrained_guidance(
        denoiser, "cond", "uncond", partial(constraint.clip, hi=0.5), guidance, scale=7.0
    )(x, T)
    assert torch.allclose(got.x0, wide(sched)(x, T).x0.clamp(-1, 0.5))


def test_repaint_steps_match_paper():
    walk = correction.repaint_steps(10, jump=3, repeats=2)
    # RePaint's get_schedule_jump(t_T=10, jump_length=3, jump_n_sample=2), whose t is 9 - place
    assert [9 - k for k in walk] == [
        9,
        8,
        7,
        6,
        7,
        8,
        9,
        8,
        7,
        6,
        5,
        4,
        3,
        4,
        5,
        6,
        5,
        4,
        3,
        2,
        1,
        0,
        1,
        2,
        3,
        2,
        1,
        0,
        -1,
    ]
    assert correction.repaint_steps(4, jump=2, repeats=1) == [0, 1, 2, 3, 4]
    for bad in ({"jump": 0, "repeats": 2}, {"jump": 1, "repeats": 0}):
        with pytest.raises(ValueError, match="expected 1 or more each"):
            correction.repaint_steps(4, **bad)


def test_repaint_preserves_marginals():
    """A DDPM step with the true variance maps p(x_t) to p(x_s), a step up maps it back: the walk may change neither."""
    g = Gaussian(schedule.VP(), mean=0.6, std=1.2)

    def exact(var_frac, sched, t, s):
        of_x0 = sched.alpha_sigma(s)[0] * variance.forward_variance(sched, t, s) / sched.alpha_sigma(t)[1] ** 2
        return (variance.fixed_small(None, sched, t, s).exp() + of_x0**2 * g.posterior_variance(t)).log()

    ts = torch.linspace(0.9, 0.2, 8, dtype=F64)
    walk = correction.repaint_steps(7, jump=2, repeats=3)
    run = partial(correction.repaint, step=partial(sampler.ddpm, variance=exact), jump_length=2, num_resamples=3)
    a, b, c = affine(run, g, g.schedule, ts, draws=len(walk) - 1)
    (mean, var), (mean_s, var_s) = g.moments(ts[0]), g.moments(ts[-1])
    assert a * mean + b == pytest.approx(float(mean_s))
    assert a**2 * var + c**2 == pytest.approx(float(var_s))


def test_correction_step_matches_formula():
    sched, x = schedule.cosine(), torch.full((1, 1), 0.7, dtype=F64)
    stay = lambda denoise, schedule, x, ts, noise: x  # noqa: E731
    ts, draw = f64(0.8, 0.6, 0.4), lambda x: torch.full_like(x, 0.5)
    (alpha_t, _), (alpha_s, _) = (sched.alpha_sigma(v) for v in (ts[0], ts[1]))
    got = correction.repaint(
        Gaussian(sched), sched, x, ts, draw, step=stay, jump_length=1, num_resamples=2
    )  # the walk is 0, 1, 0, 1, 2
    assert torch.allclose(got, alpha_t / alpha_s * x + 0.5 * variance.forward_variance(sched, ts[0], ts[1]).sqrt())
    d, sigma = Gaussian(sched)(x, ts[1]), sched.alpha_sigma(ts[1])[1]
    got = correction.langevin(Gaussian(sched), sched, x, ts[:2], draw, step=stay, snr=0.1)
    assert torch.allclose(got, x - 2 * (0.1 * sigma) ** 2 * d.eps / sigma + 0.5 * 2 * 0.1 * sigma)


def test_langevin_converges_to_marginal():
    """One correction is x + size score + sqrt(2 size) z: its recursion, exactly; at a small size p(x_s) is its rest
    point.
    """
    g = Gaussian(schedule.cosine(), mean=0.6, std=0.5)
    ts = f64(0.8, 0.4)
    mean, var = (float(m) for m in g.moments(ts[1]))
    start = lambda denoise, schedule, x, ts, noise: x  # noqa: E731 - so that the corrections alone are seen
    sigma = float(g.schedule.alpha_sigma(ts[1])[1])
    size = 2 * (0.2 * sigma) ** 2
    a, b, c = affine(partial(correction.langevin, step=start, snr=0.2, corrections=3), g, g.schedule, ts, draws=3)
    k = 1 - size / var  # score = -(x - mean) / var
    assert (a, b) == pytest.approx((k**3, mean * (1 - k**3)))
    assert c**2 == pytest.approx(2 * size * (1 + k**2 + k**4))
    a, b, c = affine(
        partial(correction.langevin, step=start, snr=0.05, corrections=2000), g, g.schedule, ts, draws=2000
    )
    assert b == pytest.approx(mean, abs=1e-3)
    assert c**2 == pytest.approx(var, rel=0.01)
    ends = affine(partial(correction.langevin, corrections=2), g, g.schedule, f64(0.8, 0.4, 0.0), draws=2)
    assert all(abs(v) < 2 for v in ends)  # none after the step to 0
