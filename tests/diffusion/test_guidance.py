import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import F64, SHAPES, f64
from oracle import Gaussian
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import guidance, prediction, sampler, schedule, variance
from ldm.diffusion.denoiser import Denoiser


class Net(nn.Module):
    """Predicts v = vector . x, and counts its calls and rows; twice the channels if asked."""

    def __init__(self, learned=False):
        super().__init__()
        self.calls, self.rows, self.learned = 0, 0, learned

    def forward(self, x, time, cond):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        out = x.sin() * cond.vector.view(-1, *[1] * (x.ndim - 1)) + time.view(-1, *[1] * (x.ndim - 1)) / 1000
        return torch.cat([out, 7 * out], 1) if self.learned else out


def make(learned=False, net=Net):
    return Denoiser(net(learned), schedule.cosine(), prediction.V())


COND, UNCOND = Condition(vector=f64(1.0, 2.0, 3.0)[:, None]), Condition(vector=f64(-1.0, 0.5, 0.0)[:, None])
T = f64(0.6)[0]


def states(shape=(3, 4, 5, 5)):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES)
def test_cfg_is_uncond_plus_scale_times_difference(shape):
    d, x = make(), states(shape)
    got = guidance.cfg(d, COND, UNCOND, scale=2.5)(x, T)
    assert (d.net.calls, d.net.rows) == (1, 6)  # one call of both
    c, u = d(x, T, COND), d(x, T, UNCOND)
    assert torch.allclose(got.x0, u.x0 + 2.5 * (c.x0 - u.x0))
    assert torch.allclose(got.eps, u.eps + 2.5 * (c.eps - u.eps))
    alpha, sigma = d.schedule.alpha_sigma(T)
    assert torch.allclose(alpha * got.x0 + sigma * got.eps, x)
    w = 1.5  # Ho & Salimans 2022, eq. 6
    assert torch.allclose(got.eps, (1 + w) * c.eps - w * u.eps)


def test_cfg_scale_1_skips_unconditional():
    d, x = make(), states()
    got = guidance.cfg(d, COND, None)(x, T)
    assert (d.net.calls, d.net.rows) == (1, 3)
    assert torch.equal(got.x0, d(x, T, COND).x0)


@pytest.mark.parametrize("t", [0.2, 0.21, 0.5, 0.7, 0.71])
def test_cfg_interval_is_inclusive(t):
    d, x = make(), states()
    guidance.cfg(d, COND, UNCOND, scale=2.0, interval=(0.21, 0.7))(x, f64(t)[0])
    assert d.net.rows == (6 if 0.21 <= t <= 0.7 else 3)


def test_cfg_rescale_matches_lin_equations_15_and_16():
    d, x = make(), states()
    plain, told = guidance.cfg(d, COND, UNCOND, scale=4.0)(x, T), d(x, T, COND)
    got = guidance.cfg(d, COND, UNCOND, scale=4.0, rescale=0.7)(x, T)
    std = lambda v: v.std(dim=(1, 2, 3), keepdim=True)  # noqa: E731
    want = 0.7 * plain.x0 * std(told.x0) / std(plain.x0) + 0.3 * plain.x0
    assert torch.allclose(got.x0, want)
    alpha, sigma = d.schedule.alpha_sigma(T)
    assert torch.allclose(alpha * got.x0 + sigma * got.eps, x)
    full = guidance.cfg(d, COND, UNCOND, scale=4.0, rescale=1.0)(x, T)
    assert torch.allclose(std(full.x0), std(told.x0))


def test_cfg_uses_conditional_variance():
    d, x = make(learned=True), states()
    want = d(x, T, COND).var_frac
    assert want.shape == x.shape
    for g in (
        guidance.cfg,
        partial(guidance.cfg, scale=2.0),
        partial(guidance.cfg, scale=2.0, interval=(0.8, 0.9)),
        partial(guidance.cfg, scale=2.0, rescale=0.5),
        partial(guidance.cfg_channels, scale=2.0, channels=3),
        partial(guidance.autoguidance, weak=make(), scale=2.0),
        partial(guidance.classifier, log_prob=lambda x_t, time: x_t.flatten(1).sum(1)),
    ):
        assert torch.allclose(g(d, COND, UNCOND)(x, T).var_frac, want)


def test_ddpm_with_cfg_and_learned_variance_matches_formula():
    """DDPM's step from guided x0 and the conditional's own variance, written out."""
    d, x, s = make(learned=True), states(), f64(0.4)[0]
    got = sampler.ddpm(
        guidance.cfg(d, COND, UNCOND, scale=2.0),
        d.schedule,
        x,
        torch.stack([T, s]),
        torch.ones_like,
        variance=variance.learned_range,
    )
    c, u = d(x, T, COND), d(x, T, UNCOND)
    mean, _ = variance.q_posterior(d.schedule, 2 * c.x0 - u.x0, x, T, s)
    assert torch.allclose(got, mean + (variance.learned_range(c.var_frac, d.schedule, T, s) / 2).exp())


def test_cfg_channels_matches_dit():
    d, x = make(), states()
    got, whole, told = (
        guidance.cfg_channels(d, COND, UNCOND, 4.0, 3)(x, T),
        guidance.cfg(d, COND, UNCOND, 4.0)(x, T),
        d(x, T, COND),
    )
    for g, w, c in [(got.x0, whole.x0, told.x0), (got.eps, whole.eps, told.eps)]:
        assert torch.allclose(g[:, :3], w[:, :3])
        assert torch.allclose(g[:, 3:], c[:, 3:])


class ImageNet(Net):
    """Adds to Net's prediction the concatenated image's sine, times the vector's square: the two interact."""

    def forward(self, x, time, cond):
        out = super().forward(x, time, cond)
        more = cond.concat.sin() * cond.vector.view(-1, 1, 1, 1) ** 2
        return out + (torch.cat([more, 3 * more], 1) if self.learned else more)


@pytest.mark.parametrize("learned", [False, True])
def test_cfg_image_text_matches_brooks_equation_3(learned):
    d, x, source = make(learned, ImageNet), states(), states().flip(0)
    full, null = replace(COND, concat=source), replace(UNCOND, concat=torch.zeros_like(source))
    e_full, e_image, e_null = d(x, T, full), d(x, T, replace(null, concat=source)), d(x, T, null)
    d.net.calls = d.net.rows = 0
    got = guidance.cfg_image_text(d, full, null, scale=7.5, image_scale=1.5)(x, T)
    assert (d.net.calls, d.net.rows) == (1, 9)
    for name in ("x0", "eps"):
        e, e_i, e_0 = (getattr(estimate, name) for estimate in (e_full, e_image, e_null))
        assert torch.allclose(getattr(got, name), e_0 + 1.5 * (e_i - e_0) + 7.5 * (e - e_i))
    alpha, sigma = d.schedule.alpha_sigma(T)
    assert torch.allclose(alpha * got.x0 + sigma * got.eps, x)
    assert torch.equal(got.var_frac, e_full.var_frac) if learned else got.var_frac is None


def test_cfg_image_text_is_cfg_where_scales_agree():
    """Equal scales guide away from no condition; image scale 1, from the image alone; scale 0, to the image alone."""
    d, x, source = make(net=ImageNet), states(), states().flip(0)
    full, null = replace(COND, concat=source), replace(UNCOND, concat=torch.zeros_like(source))
    image = replace(null, concat=source)
    for scale, image_scale, expected in (
        (3.0, 3.0, guidance.cfg(d, full, null, 3.0)),
        (3.0, 1.0, guidance.cfg(d, full, image, 3.0)),
        (0.0, 2.0, guidance.cfg(d, image, null, 2.0)),
        (1.0, 1.0, guidance.cfg(d, full, null)),
        (0.0, 0.0, guidance.cfg(d, null, None)),
    ):
        got, want = guidance.cfg_image_text(d, full, null, scale, image_scale)(x, T), expected(x, T)
        assert torch.allclose(got.x0, want.x0), (scale, image_scale)
        assert torch.allclose(got.eps, want.eps), (scale, image_scale)
    d.net.rows = 0
    guidance.cfg_image_text(d, full, None)(x, T)
    assert d.net.rows == 3
    with pytest.raises(ValueError, match="needs a null condition and has none"):
        guidance.cfg_image_text(d, full, None, image_scale=1.5)
    with pytest.raises(ValueError, match="guidance=cfg_image_text: this model has no image condition"):
        guidance.cfg_image_text(d, COND, UNCOND, scale=2.0)


def test_autoguidance_extrapolates_from_weak_model():
    d, weak, x = make(), Denoiser(nn.Identity(), schedule.cosine(), prediction.V()), states()
    weak.net.forward = lambda x, time, cond: x.cos()
    got, strong, other = guidance.autoguidance(d, COND, None, weak, 2.0)(x, T), d(x, T, COND), weak(x, T, COND)
    assert torch.allclose(got.x0, other.x0 + 2 * (strong.x0 - other.x0))
    assert torch.allclose(got.eps, 2 * strong.eps - other.eps)


@pytest.mark.parametrize("choice", [partial(guidance.cfg, scale=2.0), guidance.cfg_channels])
def test_guidance_requires_null_condition(choice):
    with pytest.raises(ValueError, match="needs a null condition and has none"):
        choice(make(), COND, None)
    with pytest.raises(ValueError, match="weaker denoiser"):
        guidance.autoguidance(make(), COND, UNCOND)


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
def test_classifier_guidance_samples_posterior(no_grad):
    """Data N(m, s^2), y seen with log p(y | x_0) Gaussian: guidance at scale 1 turns the prior's exact denoiser into
    the posterior's.
    """
    sched = schedule.VP()
    prior, noise, y = Gaussian(sched, 0.5, 0.8), 0.6, -0.4
    precision = 1 / prior.std**2 + 1 / noise**2
    posterior = Gaussian(sched, (prior.mean / prior.std**2 + y / noise**2) / precision, precision**-0.5)

    class Exact(nn.Module):
        schedule = sched

        def net_time(self, x_t, t):
            return Denoiser.net_time(self, x_t, t)

        def forward(self, x_t, t, cond):
            return prior(x_t, t)

    def log_prob(x_t, time):
        assert time.shape == (4,)
        assert time.dtype == F64
        t = time[0] / 999
        mean = prior(x_t, t).x0  # y | x_t ~ N(E[x0 | x_t], Var[x0 | x_t] + noise^2)
        return (-0.5 * (y - mean) ** 2 / (prior.posterior_variance(t) + noise**2)).sum(1)

    x = torch.linspace(-2, 2, 4, dtype=F64)[:, None]
    with no_grad():
        denoise = guidance.classifier(Exact(), Condition(), None, log_prob)
        for t in f64(0.1, 0.5, 0.95):
            got, want = denoise(x, t), posterior(x, t)
            assert torch.allclose(got.x0, want.x0)
            assert torch.allclose(got.eps, want.eps)
        double = guidance.classifier(Exact(), Condition(), None, log_prob, scale=2.0)(x, t)
        assert torch.allclose(double.eps - prior(x, t).eps, 2 * (want.eps - prior(x, t).eps))


def test_classifier_guidance_skips_zero_signal():
    d = Denoiser(Net(), schedule.Flow(), prediction.V())
    got = guidance.classifier(d, COND, None, lambda x, t: 1 / 0)(states(), f64(1.0)[0])
    assert got.x0.isfinite().all()


def test_classifier_guidance_respects_interval():
    d, x = make(), states()
    denoise = guidance.classifier(d, COND, None, lambda x_t, time: x_t.flatten(1).sum(1), interval=(0.3, 0.7))
    for t, acts in ((0.2, False), (0.3, True), (0.7, True), (0.8, False)):
        moved = denoise(x, f64(t)[0]).eps - d(x, f64(t)[0], COND).eps
        sigma = d.schedule.alpha_sigma(f64(t)[0])[1]
        assert torch.allclose(moved, -sigma.to(moved) * acts), t  # the gradient is 1 everywhere


def test_cfg_samples_overshoot_towards_condition():
    """End to end: scale 2 on two exact denoisers of N(0.5, s^2) and N(-0.5, s^2) overshoots the first's mean."""

    class Two(nn.Module):
        schedule = schedule.cosine()

        def forward(self, x_t, t, cond):
            a, b = Gaussian(self.schedule, 0.5)(x_t, t), Gaussian(self.schedule, -0.5)(x_t, t)
            pick = cond.vector > 0
            return a._replace(x0=torch.where(pick, a.x0, b.x0), eps=torch.where(pick, a.eps, b.eps))

    cond, uncond = Condition(vector=torch.ones(5, 1)), Condition(vector=-torch.ones(5, 1))
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    means = {}
    for scale in (1.0, 2.0):
        denoise = guidance.cfg(Two(), cond, uncond, scale=scale)
        means[scale] = float(sampler.ddim(denoise, Two.schedule, x, torch.linspace(1, 0, 101, dtype=F64), None).mean())
    assert means[1.0] == pytest.approx(0.5, abs=0.02)
    assert means[2.0] > 0.6
    assert math.isfinite(means[2.0])
