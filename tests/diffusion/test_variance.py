import math

import pytest
import torch
from cases import F64, SCHEDULES, f64
from oracle import Gaussian
from scipy import stats

from ldm.diffusion import grids, schedule, variance
from ldm.diffusion.denoiser import Denoised

TABLE = schedule.linear()


def ddpm(i):
    """beta, beta tilde and alpha_bar of DDPM at index i > 0, from the table."""
    bar, before = TABLE.alpha_bar[i], TABLE.alpha_bar[i - 1]
    beta = 1 - bar / before
    return beta, beta * (1 - before) / (1 - bar), bar, before


@pytest.mark.parametrize("i", [1, 300, 999])
def test_q_posterior_matches_ddpm_equation_7(i):
    beta, tilde, bar, before = ddpm(i)
    t, s = f64((i + 1) / 1000)[0], f64(i / 1000)[0]
    x0, x_t = torch.randn(2, 4, 3, dtype=F64)
    mean, var = variance.q_posterior(TABLE, x0, x_t, t, s)
    want = before.sqrt() * beta / (1 - bar) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - bar) * x_t
    assert torch.allclose(mean, want, rtol=1e-9)
    assert torch.allclose(var, tilde, rtol=1e-9)
    assert variance.forward_variance(TABLE, t, s) == pytest.approx(float(beta))
    assert variance.fixed_small(None, TABLE, t, s).exp() == pytest.approx(float(tilde))
    assert variance.fixed_large(None, TABLE, t, s).exp() == pytest.approx(float(beta))


@pytest.mark.parametrize("name", SCHEDULES)
def test_q_posterior_matches_bayes(name):
    """The joint Gaussian of (x_s, x_t) given x0, conditioned on x_t."""
    sched = SCHEDULES[name]
    t, s = f64(0.9, 0.4), f64(0.7, 0.05)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = sched.alpha_sigma(t), sched.alpha_sigma(s)
    x0, x_t = f64(0.3, -1.0), f64(2.0, 0.7)
    cov = alpha_t / alpha_s * sigma_s**2
    mean, var = variance.q_posterior(sched, x0, x_t, t, s)
    assert torch.allclose(mean, alpha_s * x0 + cov / sigma_t**2 * (x_t - alpha_t * x0), rtol=1e-8)
    assert torch.allclose(var, sigma_s**2 - cov**2 / sigma_t**2, rtol=1e-8)


def test_fixed_small_variance_at_last_step_uses_next():
    t, zero = f64(0.001)[0], f64(0.0)[0]
    _, tilde, _, _ = ddpm(1)
    assert variance.fixed_small(None, TABLE, t, zero).exp() == pytest.approx(float(tilde))
    assert variance.fixed_small(None, TABLE, t, zero, floor=f64(1e-3)[0]).exp() == pytest.approx(1e-3)
    assert variance.fixed_large(None, TABLE, t, zero).exp() == pytest.approx(1e-4)
    frac = torch.full((2, 3), -1.0, dtype=F64)
    assert variance.learned_range(frac, TABLE, t, zero).exp().flatten().tolist() == pytest.approx([float(tilde)] * 6)


def test_learned_range_matches_equation_15():
    beta, tilde, _, _ = ddpm(400)
    t, s = f64(0.401)[0], f64(0.4)[0]
    for frac, want in [(-1.0, tilde.log()), (1.0, beta.log()), (0.5, 0.75 * beta.log() + 0.25 * tilde.log())]:
        got = variance.learned_range(torch.full((2, 3), frac, dtype=F64), TABLE, t, s)
        assert torch.allclose(got, want.expand(2, 3), rtol=1e-9)
    batch = variance.learned_range(torch.zeros(2, 3, 1, 1, dtype=F64), TABLE, f64(0.401, 0.001), f64(0.4, 0.0))
    assert torch.allclose(batch[0], (beta * tilde).sqrt().log())
    with pytest.raises(ValueError, match="twice the channels of x_t: train with learned_variance=true"):
        variance.learned_range(None, TABLE, t, s)


def test_gaussian_kl_and_nll_match_torch():
    q, p = (torch.distributions.Normal(f64(0.3), f64(0.5)), torch.distributions.Normal(f64(-1.0), f64(1.7)))
    got = variance.gaussian_kl(f64(0.3), 2 * f64(0.5).log(), f64(-1.0), 2 * f64(1.7).log())
    assert torch.allclose(got, torch.distributions.kl_divergence(q, p))
    got = variance.gaussian_nll(f64(0.2), f64(-1.0), 2 * f64(1.7).log())
    assert torch.allclose(got, -p.log_prob(f64(0.2)))


def test_decoder_nll_is_normalized():
    levels = (torch.arange(256, dtype=F64) / 127.5 - 1).expand(3, 256)
    mean, std = f64(0.1, -0.99, 0.4)[:, None], f64(0.3, 0.01, 2.0)[:, None]
    nll = variance.decoder_nll(levels, mean, 2 * std.log())
    assert torch.allclose((-nll).exp().sum(1), torch.ones(3, dtype=F64), atol=1e-9)  # the levels share out all the mass
    inner = stats.norm.cdf(levels[0, 100] + 1 / 255, 0.1, 0.3) - stats.norm.cdf(levels[0, 100] - 1 / 255, 0.1, 0.3)
    assert nll[0, 100] == pytest.approx(-math.log(inner), rel=1e-9)
    assert nll[0, 0] == pytest.approx(-stats.norm.logcdf(-1 + 1 / 255, 0.1, 0.3), rel=1e-9)
    assert nll[0, 255] == pytest.approx(-stats.norm.logsf(1 - 1 / 255, 0.1, 0.3), rel=1e-9)


def test_decoder_nll_is_finite_with_gradient_far_from_mean():
    mean = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    nll = variance.decoder_nll(torch.tensor([-1.0, 1.0, 0.9]), mean, torch.full((3,), -9.0))
    nll.sum().backward()
    assert nll.isfinite().all()
    assert (nll > 100).all()
    assert mean.grad.sign().tolist() == [1, -1, -1]


# Bits per dimension. Four points have the first and second moments of (x0, eps), which is all that the Gaussian terms
# depend on: no chance.
def four(g):
    return (g.mean + g.std * f64(1, 1, -1, -1))[:, None], lambda x: f64(1, -1, 1, -1)[:, None].expand_as(x)


def entropy(g):
    """E[-log2 p(x0)]."""
    return 0.5 * math.log2(2 * math.pi * math.e * g.std**2)


def exact_end(g):
    """`small`, but with the true Var[x0 | x_t] at the last step."""
    return lambda var_frac, sched, t, s: variance.fixed_small(None, sched, t, s, floor=g.posterior_variance(t))


def terms(g, ts):
    """The bound's terms (N,) without its prior, exact in expectation: vlb_term on all steps and all four points as one
    batch.
    """
    n = len(ts) - 1
    t, s = ts[:-1].repeat_interleave(4), ts[1:].repeat_interleave(4)
    x0, noise = four(g)
    x0 = x0.repeat(n, 1)
    alpha, sigma = (c[:, None] for c in g.schedule.alpha_sigma(t))
    x_t = alpha * x0 + sigma * noise(x0[:4]).repeat(n, 1)
    return (
        variance.vlb_term(g.schedule, x0, x_t, t, s, g(x_t, t), exact_end(g), variance.gaussian_nll).view(n, 4).mean(1)
    )


@pytest.mark.parametrize(
    ("sched", "start"), [(schedule.VP(), 1.0), (schedule.linear(), 1.0), (schedule.cosine(), 0.99)]
)
def test_bits_per_dim_converges_to_likelihood(sched, start):
    g = Gaussian(sched, mean=0.2, std=0.7)
    gaps = {}
    for n in (1000, 2000, 4000):
        ts = grids.log_snr(sched, n, start=start, end=0.02)
        each = terms(g, ts)
        assert (each[:-1] > -1e-12).all()  # each a KL
        gaps[n] = float(each.sum()) - entropy(g)
    assert 0 < gaps[4000] <= 0.01
    for n in (1000, 2000):
        assert math.log2(gaps[2 * n] / gaps[n]) == pytest.approx(-1, abs=0.15)


def test_bits_per_dim_sums_its_terms():
    g = Gaussian(schedule.linear(), mean=0.2, std=0.7)
    x0, noise = four(g)
    ts = grids.log_snr(g.schedule, 30, end=0.02)
    bits = variance.bits_per_dim(g, g.schedule, x0, ts, noise, exact_end(g), variance.gaussian_nll)
    assert bits["terms"].shape == (30, 4)
    assert torch.allclose(bits["terms"].mean(1), terms(g, ts), rtol=1e-9)
    assert torch.allclose(bits["prior"] + bits["terms"].sum(0), bits["total"])
    alpha, sigma = g.schedule.alpha_sigma(ts[0])
    assert torch.allclose(
        bits["prior"], (sigma**2 + (alpha * x0[:, 0]) ** 2 - 1 - 2 * sigma.log()) / 2 / math.log(2), rtol=1e-6
    )


@pytest.mark.parametrize("sched", [schedule.VP(), schedule.linear(), schedule.EDM(3.0)])
def test_bits_per_dim_with_exact_variance_is_likelihood(sched):
    """Gaussian data has Gaussian p(x_s | x_t) at any step, so that the bound is tight for a network that knows its
    variance.
    """
    g = Gaussian(sched, mean=0.2, std=0.7)
    x0, noise = four(g)
    ts = torch.cat([torch.linspace(1, 0.02, 6, dtype=F64), f64(0.0)])

    def exact(var_frac, sched, t, s):
        of_x0 = sched.alpha_sigma(s)[0] * variance.forward_variance(sched, t, s) / sched.alpha_sigma(t)[1] ** 2
        return (variance.q_posterior(sched, x0, x0, t, s)[1] + of_x0**2 * g.posterior_variance(t)).log()

    total = variance.bits_per_dim(g, sched, x0, ts, noise, exact, variance.gaussian_nll)["total"].mean()
    mean, var = g.moments(ts[0])
    alpha, sigma = sched.alpha_sigma(ts[0])
    wide = alpha**2 + sigma**2
    start = 0.5 * ((var + mean**2) / wide - 1 - (var / wide).log()) / math.log(2)
    assert float(total - start) == pytest.approx(entropy(g), abs=1e-9)


def test_learned_variance_reaches_likelihood():
    g = Gaussian(schedule.VP(), mean=0.2, std=0.7)
    x0, noise = four(g)
    ts = torch.linspace(1, 0, 6, dtype=F64)

    def denoise(x, t):
        return Denoised(*g(x, t)[:2], torch.zeros_like(x))

    def middle(f, sched, t, s):
        return (variance.fixed_small(None, sched, t, s) + variance.fixed_large(None, sched, t, s)) / 2

    got, want = (
        variance.bits_per_dim(d, g.schedule, x0, ts, noise, v, variance.gaussian_nll)["total"]
        for d, v in [(denoise, variance.learned_range), (g, middle)]
    )
    assert torch.allclose(got, want)


def test_bits_per_dim_of_discrete_pixels_bounds_entropy():
    """8-bit data: the bound lies above the exact entropy of the levels, and near it."""
    g = Gaussian(schedule.linear(4000), mean=0.1, std=0.3)
    levels = torch.arange(256, dtype=F64) / 127.5 - 1
    mass = (-variance.decoder_nll(levels, f64(0.1), 2 * f64(0.3).log())).exp()
    x0 = levels[torch.multinomial(mass, 2000, replacement=True, generator=torch.Generator().manual_seed(0))][:, None]
    generator = torch.Generator().manual_seed(1)
    ts = grids.log_snr(g.schedule, 500, end=1 / 4000)
    bits = variance.bits_per_dim(
        g, g.schedule, x0, ts, lambda x: torch.randn(x.shape, dtype=F64, generator=generator), exact_end(g)
    )
    nll = variance.decoder_nll(x0, f64(0.1), 2 * f64(0.3).log()).squeeze(1) / math.log(2)
    assert -0.02 < float((bits["total"] - nll).mean()) < 0.2
