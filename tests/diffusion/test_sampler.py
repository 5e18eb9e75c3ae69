"""Every deterministic sampler's order of convergence on Gaussian data, and what holds for all samplers alike."""

import math
from functools import partial

import pytest
import torch
from cases import F64, SHAPES, f64
from oracle import Gaussian, affine
from steps import ORDERED, STOCHASTIC

from ldm.diffusion import correction, grids, sampler, schedule
from ldm.tensors import KeyedNoise

SPAN = {"edm": (0.5, 0.001)}  # t from and to; (0.9, 0.1) otherwise
# UniPC-p is of order p + 1 (Zhao et al. 2023, section 3): its predictor's 2, and one more by the corrector.
ORDER = {
    "ddim": (sampler.ddim, 1),
    "euler": (sampler.euler, 1),
    "heun": (sampler.heun, 2),
    "dpmpp_2m": (sampler.dpmpp_2m, 2),
    "plms": (sampler.plms, 2),
    "unipc": (sampler.unipc, 3),
}
START = torch.linspace(-1, 2, 4, dtype=F64)[:, None]


def even_log_snr(sched, n, start, end):
    hi, lo = sched.log_snr(f64(start, end))
    return sched.t_from_log_snr(torch.linspace(0, 1, n + 1, dtype=F64) * (lo - hi) + hi)


def slope(run, sched, grid, ns=(64, 128, 256)):
    """Of log error against log n, by least squares."""
    g, errors = Gaussian(sched, mean=0.6, std=1.5), []
    for n in ns:
        ts = grid(n)
        errors.append((run(g, sched, START, ts, None) - g.flow(START, ts[0], ts[-1])).abs().max().log2())
    x, y = f64(*map(math.log2, ns)), torch.stack(errors)
    return -float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@pytest.mark.parametrize("sched", ORDERED)
@pytest.mark.parametrize("name", ORDER)
def test_sampler_has_its_order_of_convergence(name, sched):
    run, order = ORDER[name]
    got = slope(run, ORDERED[sched], lambda n: even_log_snr(ORDERED[sched], n, *SPAN.get(sched, (0.9, 0.1))))
    assert got == pytest.approx(order, abs=0.15)


def test_plms_is_of_order_3_on_even_grid():
    """Its Adams-Bashforth 4 weights are those of equal steps; then its start, an improved Euler step, is what limits
    it.
    """
    flow = schedule.Flow()
    assert slope(sampler.plms, flow, lambda n: torch.linspace(0.95, 0.05, n + 1, dtype=F64)) == pytest.approx(
        3, abs=0.15
    )
    assert slope(sampler.plms, flow, lambda n: torch.linspace(0.6, 0.2, n + 1, dtype=F64)) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("sched", [schedule.Flow(), schedule.GVP(), schedule.zero_terminal_snr(schedule.cosine())])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_sampler_has_its_order_from_zero_signal(sched, name, order):
    assert slope(ORDER[name][0], sched, lambda n: torch.linspace(1, 0.1, n + 1, dtype=F64)) == pytest.approx(
        order, abs=0.15
    )


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("sched", [*ORDERED.values(), schedule.GVP(), schedule.zero_terminal_snr(schedule.linear())])
def test_sampler_converges_from_noise_to_data(name, sched):
    g = Gaussian(sched)
    ts = grids.uniform_grid(sched, 400)
    if sched is ORDERED["edm"]:
        ts = grids.karras(sched, 400)
    mean, var = g.moments(ts[0])
    x = mean + var.sqrt() * START
    got = ORDER[name][0](g, sched, x, ts, None)
    assert torch.allclose(got, g.mean + g.std * START, atol=0.03)


def test_ode_frame_velocity():
    """y = x / m moves along u = sigma / m at (y - x0) / u: eps where there is signal at t = 1, eps - x0 where there is
    none.
    """
    for sched, velocity in [(schedule.cosine(), lambda d: d.eps), (schedule.GVP(), lambda d: d.eps - d.x0)]:
        frame, t, g = sampler.ode_frame(sched), f64(0.4)[0], Gaussian(sched)
        m, u = frame(t)
        d = g(START, t)
        assert torch.allclose((START / m - d.x0) / u, velocity(d))
        after = g.flow(START, t, t - 1e-6) / frame(t - 1e-6)[0]
        assert torch.allclose((after - START / m) / (frame(t - 1e-6)[1] - u), velocity(d), atol=1e-4)


@pytest.mark.parametrize("run", [sampler.euler, sampler.heun])
@pytest.mark.parametrize("sched", ["edm", "cosine", "flow"])
def test_churn_preserves_marginal(run, sched):
    """More noise, then more steps: on a fine grid the mean and variance of the data come out, whatever the churn."""
    g = Gaussian(ORDERED[sched])
    ts = grids.karras(g.schedule, 200, sigma_min=0.01, sigma_max=20.0)
    a, b, c = affine(partial(run, s_churn=40.0), g, g.schedule, ts, draws=200)
    mean, var = g.moments(ts[0])
    assert a * float(mean) + b == pytest.approx(g.mean, abs=0.01)
    assert math.sqrt(a**2 * float(var) + c**2) == pytest.approx(
        g.std, rel={sampler.euler: 0.06, sampler.heun: 0.005}[run]
    )
    assert c > 0.5 * g.std


def test_add_churn_matches_algorithm_2():
    sched = schedule.EDM()
    x, t = f64(1.0, 2.0)[:, None], f64(0.1)[0]
    y, t_hat = sampler.add_churn(sched, x, t, torch.ones_like, 0.3, (0.0, 50.0), 1.1)
    assert 80 * t_hat == pytest.approx(8 * 1.3)
    assert torch.allclose(y, x + 1.1 * math.sqrt((8 * 1.3) ** 2 - 64))
    for within in [(0.0, 7.9), (8.1, 50.0)]:
        assert sampler.add_churn(sched, x, t, torch.ones_like, 0.3, within, 1.0) == (x, t)
    sched = schedule.cosine()
    y, t_hat = sampler.add_churn(sched, x, t, torch.ones_like, 0.3, (0.0, 50.0), 1.0)
    (a, s), (a_hat, s_hat) = sched.alpha_sigma(t), sched.alpha_sigma(t_hat)
    assert s_hat / a_hat == pytest.approx(float(1.3 * s / a))
    assert torch.allclose(y / a_hat, x / a + ((s_hat / a_hat) ** 2 - (s / a) ** 2).sqrt())  # algorithm 2 in x / alpha
    flow = schedule.Flow()
    assert sampler.add_churn(flow, x, f64(1.0)[0], torch.ones_like, 0.3, (0.0, math.inf), 1.0)[1] == 1


@pytest.mark.parametrize("run", [sampler.euler, sampler.heun])
def test_churn_is_at_most_sqrt_2(run):
    g = Gaussian(schedule.EDM())
    ts = torch.tensor([0.1, 0.01], dtype=F64)
    seen = []

    def denoise(x, t):
        seen.append(float(t))
        return g(x, t)

    run(denoise, g.schedule, torch.zeros(1, 1, dtype=F64), ts, torch.ones_like, s_churn=1000.0)
    assert seen[0] == pytest.approx(0.1 * math.sqrt(2))
    run(denoise, g.schedule, torch.zeros(1, 1, dtype=F64), ts, torch.ones_like, s_churn=0.25, s_range=(0.0, 7.0))
    assert seen[-1] in (0.01, 0.1)
    assert 0.1 in seen
    run(denoise, g.schedule, torch.zeros(1, 1, dtype=F64), ts, torch.ones_like, s_churn=0.25)
    assert max(seen[-2:]) == pytest.approx(0.125)


def test_ddim_invert_round_trip():
    g = Gaussian(schedule.linear())
    ts = grids.replace_end(grids.trailing(g.schedule, 500), 1e-3)
    x = g.mean + g.std * START
    noise = sampler.ddim_invert(g, g.schedule, x, ts, None)
    assert torch.allclose(noise, g.flow(x, ts[-1], ts[0]), atol=0.03)
    assert torch.allclose(sampler.ddim(g, g.schedule, noise, ts, None), x, atol=0.012)
    one = sampler.ddim_invert(g, g.schedule, x, f64(0.5, 0.2), None)
    d = g(x, f64(0.2)[0])
    alpha, sigma = g.schedule.alpha_sigma(f64(0.5)[0])
    assert torch.allclose(one, alpha * d.x0 + sigma * d.eps)
    with pytest.raises(ValueError, match="cannot start at t = 0"):
        sampler.ddim_invert(g, g.schedule, x, grids.trailing(g.schedule, 5), None)


EVERY = ORDER | STOCHASTIC | {"dpmpp_2m_sde": (partial(sampler.dpmpp_2m, eta=1.0), None)}
EVERY |= {"repaint": (partial(correction.repaint, jump_length=2, num_resamples=2), None)}


@pytest.mark.parametrize("name", [*EVERY, "ddim_invert"])
@pytest.mark.parametrize("ts", [[0.5, 0.7, 0.0], [0.5, 0.5], [1.2, 0.0], [0.5, -0.1], [0.5], [float("nan"), 0.0]])
def test_sampler_rejects_grid_that_does_not_descend(name, ts):
    run = EVERY[name][0] if name in EVERY else sampler.ddim_invert
    g = Gaussian(schedule.linear())
    with pytest.raises(ValueError, match="must be two or more times that descend"):
        run(g, g.schedule, START, f64(*ts), torch.randn_like)


@pytest.mark.parametrize("name", EVERY)
def test_sampler_is_independent_of_shape_dtype_and_batch(name):
    """Shape-blind, float32 in float32 out, never asked at t = 0, no argument changed, the same at any batch size."""
    run, g = EVERY[name][0], Gaussian(schedule.cosine())
    ts = grids.trailing(g.schedule, 7)
    asked = []

    def denoise(x, t):
        asked.append(float(t))
        return g(x, t)

    for shape in SHAPES:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        before = x.clone()
        whole = run(denoise, g.schedule, x, ts, KeyedNoise(0, range(3)).sampler_noise("s"))
        assert whole.shape == x.shape
        assert whole.dtype == torch.float32
        assert torch.equal(x, before)
        assert whole.isfinite().all()
        alone = run(denoise, g.schedule, x[1:2], ts, KeyedNoise(0, [1]).sampler_noise("s"))
        assert torch.allclose(alone, whole[1:2], atol=1e-6)
    assert min(asked) > 0
    if name in ORDER:
        assert len(asked) / 8 == {"heun": 13, "plms": 8}.get(name, 7)


@pytest.mark.parametrize("name", EVERY)
def test_sampler_returns_state_at_last_time(name):
    """And by Monte Carlo, 4,000 draws on 299 steps, its mean and standard deviation."""
    run, g = EVERY[name][0], Gaussian(schedule.VP(), mean=0.6, std=1.5)
    ts = torch.linspace(1, 0.3, 300, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, dtype=F64, generator=generator)  # noqa: E731
    (mean, var), (mean_s, var_s) = g.moments(ts[0]), g.moments(ts[-1])
    x = mean + var.sqrt() * noise(torch.empty(4000, 1))
    got = run(g, g.schedule, x, ts, noise)
    assert float(got.mean()) == pytest.approx(float(mean_s), abs=0.08)
    assert float(got.std()) == pytest.approx(float(var_s.sqrt()), rel=0.05)
