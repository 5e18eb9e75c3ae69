import copy
import math

import pytest
import torch
from cases import F64, NO_SIGNAL, SCHEDULES, TABLES, Net, draw, f64
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from ldm.diffusion import grids, prediction, schedule, times, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.sampler import ddpm
from ldm.errors import ConfigError

ENTRIES = torch.arange(1, 1001, dtype=F64) / 1000


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schedule.linear(), {"beta_schedule": "linear"}),
        (schedule.scaled_linear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (schedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (schedule.sigmoid_beta(), {"beta_schedule": "sigmoid"}),
        (
            schedule.zero_terminal_snr(schedule.scaled_linear()),
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "rescale_betas_zero_snr": True,
            },
        ),
    ],
)
def test_schedule_tables_match_diffusers(ours, theirs):
    alpha, sigma = ours.alpha_sigma(ENTRIES)
    theirs = DDPMScheduler(**theirs).alphas_cumprod.double()
    assert torch.allclose(alpha**2, theirs, atol=1e-6, rtol=0)
    assert torch.allclose(sigma**2, 1 - theirs, atol=1e-6, rtol=0)


def test_schedule_tables_match_formulas():
    t = ENTRIES
    beta = (1 - (1 - (t + 1e-4).sqrt()) / (1 - (t - 1e-3 + 1e-4).sqrt())).clamp(max=0.999)
    assert torch.allclose(schedule.sqrt().alpha_bar, (1 - beta).cumprod(0), rtol=1e-12)
    low, high = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-3))
    assert torch.allclose(
        schedule.sigmoid().alpha_bar, ((high - 1 / (1 + (3 - 6 * t).exp())) / (high - low)).clamp(min=1e-9), rtol=1e-9
    )
    assert torch.allclose(
        schedule.sigmoid(start=0, end=3, tau=0.5).alpha_bar[499],
        (f64(6).sigmoid() - f64(3).sigmoid()) / (f64(6).sigmoid() - 0.5),
    )


def test_pde_refiner_is_its_code_s_scheduler():
    """pdearena's betas in diffusers' scheduler; log-SNR 14.7, 9.8, 4.9 and no signal (Lippe et al. 2023, app. C)."""
    refiner, betas = schedule.pde_refiner(), [4e-7 ** (k / 3) for k in (3, 2, 1, 0)]
    theirs = DDPMScheduler(num_train_timesteps=4, trained_betas=betas, prediction_type="v_prediction")
    assert torch.allclose(refiner.alpha_bar, theirs.alphas_cumprod.double(), atol=1e-6, rtol=0)
    times = torch.arange(1, 5, dtype=F64) / 4
    assert refiner.log_snr(times)[:3].tolist() == pytest.approx([14.73, 9.82, 4.90], abs=0.01)
    assert refiner.log_snr(times)[3] == -torch.inf
    assert refiner.alpha_sigma(f64(0.25))[1] == pytest.approx(4e-7**0.5)
    assert schedule.pde_refiner(steps=0).alpha_bar.tolist() == [0.0]
    with pytest.raises(ConfigError, match="does not determine x0 at t = 1"):
        Denoiser(nn.Identity(), refiner, prediction.Eps())
    for options in ({"steps": -1}, {"min_variance": 1.0}):
        with pytest.raises(ConfigError, match="expected 0 steps or more, a variance below 1"):
            schedule.pde_refiner(**options)


def test_regression_ignores_the_state_and_returns_the_output():
    """One step of ddpm from any start is the network's output at an input of 0, and its loss is the squared error."""
    denoiser = Denoiser(Net(), schedule.pde_refiner(steps=0), prediction.Regression())
    x0, (a, b) = draw(0), (draw(k) for k in (1, 2))
    expected = Net()(torch.zeros_like(a), torch.zeros(()))
    for start in (a, b):
        ts = grids.trailing(denoiser.schedule, 1)
        drawn = ddpm(lambda x, t: denoiser(x, t, None), denoiser.schedule, start, ts, lambda x: 1 / 0)
        torch.testing.assert_close(drawn, expected)
    t = f64(1.0).expand(len(x0))
    loss = Objective(times.independent, weighting.x0).loss_at(denoiser, x0, None, t, a)["loss"]
    torch.testing.assert_close(loss, (expected - x0).square().mean(1))


def test_schedule_with_more_steps_refines_same_process():
    for make in (schedule.linear, schedule.scaled_linear, schedule.sigmoid_beta, schedule.cosine):
        coarse, fine = make(1000).log_snr(f64(0.3, 0.5, 0.9)), make(8000).log_snr(f64(0.3, 0.5, 0.9))
        assert torch.allclose(coarse, fine, atol=0.06)
    assert 1 - schedule.linear(4000).alpha_bar[0] == pytest.approx(
        0.25e-4
    )  # improved-diffusion scales beta by 1000 / T


def test_schedule_closed_forms():
    t = f64(0.2, 0.7)
    alpha, sigma = schedule.VP(0.1, 20.0).alpha_sigma(t)
    assert torch.allclose(alpha, torch.exp(-0.25 * t**2 * 19.9 - 0.5 * t * 0.1), rtol=1e-12)
    assert torch.allclose(sigma, (1 - alpha**2).sqrt(), rtol=1e-12)
    alpha, sigma = schedule.GVP().alpha_sigma(t)
    assert torch.allclose(alpha, torch.cos(t * math.pi / 2))
    assert torch.allclose(sigma, torch.sin(t * math.pi / 2))
    alpha, sigma = schedule.EDM(80.0).alpha_sigma(t)
    assert alpha.eq(1).all()
    assert torch.allclose(sigma, 80 * t)
    assert torch.allclose(schedule.EDM(80.0).net_time(t), (80 * t).log() / 4)
    assert torch.allclose(schedule.VP().net_time(t), 999 * t)
    assert torch.allclose(schedule.GVP().net_time(t), 1000 * t)


def test_flow_shift_matches_diffusers():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = schedule.Flow(3.0)
    assert torch.allclose(ours.alpha_sigma(ENTRIES.flip(0))[1], theirs.sigmas[:1000].double(), atol=1e-6)
    assert torch.allclose(ours.net_time(ENTRIES.flip(0)), theirs.timesteps.double(), atol=1e-3)
    assert schedule.flow_at(16384, base_dim=4096) == schedule.Flow(2.0)


def test_shifted_moves_log_snr():
    t = ENTRIES[:-1]
    moved = schedule.shifted(schedule.cosine(), 4.0).log_snr(t) - schedule.cosine().log_snr(t)
    assert torch.allclose(moved, torch.full_like(t, -2 * math.log(4)), atol=1e-9)


def test_zero_terminal_snr_has_no_signal_at_end():
    before, after = schedule.linear(), schedule.zero_terminal_snr(schedule.linear())
    assert after.alpha_bar[-1] == 0
    assert after.alpha_bar[0] == pytest.approx(float(before.alpha_bar[0]), rel=1e-12)
    assert after.alpha_sigma(torch.ones(())) == (0, 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_invariants(name):
    sched = SCHEDULES[name]
    t = torch.linspace(1e-3, 1 if name not in NO_SIGNAL else 0.999, 1777, dtype=F64)
    alpha, sigma = sched.alpha_sigma(t)
    log_snr = sched.log_snr(t)
    assert torch.allclose(log_snr, 2 * (alpha / sigma).log(), rtol=1e-9, atol=1e-9)
    assert (log_snr.diff() < 0).all()
    assert (sigma.diff() >= 0).all()
    assert (alpha.diff() <= 0).all()
    assert torch.allclose(sched.t_from_log_snr(log_snr), t, atol=1e-9)
    assert torch.allclose(sched.log_snr(sched.t_from_log_snr(log_snr)), log_snr, rtol=1e-8, atol=1e-8)
    assert sched.t_from_log_snr(log_snr.float()).dtype == torch.float32
    assert sched.t_from_log_snr(log_snr[3]).shape == ()
    zero, one = f64(0, 1)
    assert [float(c) for c in sched.alpha_sigma(zero)] == [1, 0]
    assert (float(sched.alpha_sigma(one)[0]) == 0) == (name in NO_SIGNAL)
    assert torch.isposinf(sched.log_snr(zero))
    assert sched.t_from_log_snr(sched.log_snr(zero)) == 0
    assert sched.t_from_log_snr(sched.log_snr(one)) == pytest.approx(1)
    single, double = sched.alpha_sigma(t.float()), sched.alpha_sigma(t.float().double())
    for s, d in zip(single, double, strict=True):
        assert s.dtype == torch.float32
        assert d.dtype == F64
        # sin(pi (1 - t) / 2) and the last steps of the clipped tables turn the rounding of t into more
        assert torch.allclose(s.double(), d, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_schedule_entries_are_exact_in_float32(name):
    sched = TABLES[name]
    t = torch.arange(1, 1001) / 1000
    assert t.dtype == torch.float32
    assert sched.net_time(t).tolist() == list(range(1000))
    alpha, sigma = sched.alpha_sigma(t)
    assert torch.equal(alpha, sched.alpha_bar.float().sqrt())
    assert torch.equal(sigma, (1 - sched.alpha_bar).float().sqrt())
    assert sched.net_time(torch.zeros(())) == 0
    between = sched.alpha_sigma(f64(0.0105))[0] ** 2
    assert torch.allclose(between, sched.alpha_bar[9:11].mean())  # halfway between entries 9 and 10


def test_schedule_is_not_changed_by_module_conversion():
    module = torch.nn.Linear(1, 1)
    module.schedule = schedule.cosine()
    t = torch.full((2,), 0.37)
    before = module.schedule.alpha_sigma(t)
    copied = copy.deepcopy(module.half())
    assert torch.equal(torch.stack(copied.schedule.alpha_sigma(t)), torch.stack(before))
    assert "schedule" not in module.state_dict()


def test_schedule_cached_in_inference_mode_is_trainable():
    table = schedule.linear()
    with torch.inference_mode():
        table.alpha_sigma(torch.tensor([0.5]))
    weight = torch.ones(1, requires_grad=True)
    (weight * table.alpha_sigma(torch.tensor([0.5]))[0]).sum().backward()
    assert weight.grad == table.alpha_sigma(torch.tensor([0.5]))[0]


@pytest.mark.parametrize("bar", [[0.9, 0.9], [1.0, 0.5], [0.5, -0.1], [float("nan")]])
def test_discrete_schedule_rejects_non_decreasing_table(bar):
    with pytest.raises(ValueError, match="alpha_bar must fall"):
        schedule.DiscreteSchedule(f64(*bar))


@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_is_alpha_x0_plus_sigma_eps(name):
    x0, eps, t = draw(0, (3, 2, 4, 4)), draw(1, (3, 2, 4, 4)), f64(0.2, 0.5, 1.0)
    alpha, sigma = SCHEDULES[name].alpha_sigma(t)
    x_t = schedule.add_noise(SCHEDULES[name], x0, eps, t)
    assert torch.equal(x_t, torch.stack([alpha[i] * x0[i] + sigma[i] * eps[i] for i in range(3)]))
    assert torch.equal(schedule.add_noise(SCHEDULES[name], x0, eps, t[1])[1], x_t[1])
    assert schedule.add_noise(SCHEDULES[name], x0.bfloat16(), eps.bfloat16(), t).dtype == torch.bfloat16


def test_schedules_equal_compares_log_snr_and_network_time():
    class Seconds(schedule.VP):
        def net_time(self, t):
            return t

    assert schedule.schedules_equal(schedule.VP(), schedule.VP())
    assert not schedule.schedules_equal(schedule.VP(), schedule.VP(beta_max=10.0))
    assert not schedule.schedules_equal(schedule.VP(), Seconds())
