"""Times, states and networks in bfloat16 or float16: what is computed in float32, and how far the rest is off."""

import pytest
import torch
from cases import F64, SCHEDULES, Net, draw
from helpers import randomize_weights
from hydra.utils import instantiate
from test_rules import OPTIONS

from ldm.condition import Condition
from ldm.config.compose import compose_option
from ldm.diffusion import objective, prediction, schedule, weighting
from ldm.diffusion.denoiser import Denoiser
from ldm.net.dit import DiT
from ldm.net.unet import UNet
from ldm.tensors import KeyedNoise

LOW = [torch.bfloat16, torch.float16]
LINEAR = {"_target_": "ldm.diffusion.schedule.linear"}
SHAPE = (3, 2, 4, 4)


@pytest.fixture(params=[option for group, option in OPTIONS if group == "schedule"])
def configured(request):
    """Return the schedule of an option of conf/schedule."""
    node = compose_option("schedule", request.param)
    return instantiate({**node, **({"schedule": LINEAR} if "schedule" in node else {})})


def answers(sched, t: torch.Tensor, log_snr: torch.Tensor) -> dict[str, torch.Tensor]:
    alpha, sigma = sched.alpha_sigma(t)
    return {
        "alpha": alpha,
        "sigma": sigma,
        "log_snr": sched.log_snr(t),
        "net_time": sched.net_time(t),
        "t": sched.t_from_log_snr(log_snr),
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_schedule_answers_in_float32(configured, dtype, autocast):
    """The answer to t in 16 bits is the float32 answer to that number, under autocast too; in float64 it stays."""
    t, log_snr = torch.linspace(0.004, 0.99, 33).to(dtype), torch.linspace(9, -7, 33).to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        low = answers(configured, t, log_snr)
    single, double = answers(configured, t.float(), log_snr.float()), answers(configured, t.double(), log_snr.double())
    for name, value in low.items():
        assert value.dtype == torch.float32, name
        assert torch.equal(value, single[name]), name
        assert double[name].dtype == F64
        torch.testing.assert_close(value.double(), double[name], rtol=2e-5, atol=2e-6)
    assert configured.alpha_sigma(t[0])[0].shape == ()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", SCHEDULES)
def test_add_noise_rounds_once(name, dtype):
    x0, eps, t = draw(0, SHAPE).to(dtype), draw(1, SHAPE).to(dtype), torch.tensor([0.2, 0.5, 0.9])
    x_t = schedule.add_noise(SCHEDULES[name], x0, eps, t)
    assert x_t.dtype == dtype
    assert torch.equal(x_t, schedule.add_noise(SCHEDULES[name], x0.float(), eps.float(), t).to(dtype))
    scalar = schedule.add_noise(SCHEDULES[name], x0, eps, t[1])
    assert torch.equal(scalar[1], x_t[1])


class Recorded(Net):
    """Records the network's inputs; answers in its input's dtype."""

    def forward(self, x, time, cond=None):
        self.x, self.time = x, time
        return super().forward(x, time.to(x.dtype), cond)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", SCHEDULES)
def test_denoiser_estimates_are_rounded_once(name, dtype, by_row):
    """The network gets the state in its dtype and its time in float32; the estimates are those of float32, rounded."""
    net, t = Recorded(), torch.tensor([0.25, 0.5, 0.75] if by_row else 0.5, dtype=dtype)
    denoiser, x_t = Denoiser(net, SCHEDULES[name], prediction.V()), draw(0, SHAPE).to(dtype)
    estimate = denoiser(x_t, t, Condition())
    assert (net.x.dtype, net.time.dtype) == (dtype, torch.float32)
    assert torch.equal(net.time, SCHEDULES[name].net_time(t.float()).expand(3))
    out = net(net.x, net.time)
    alpha, sigma = SCHEDULES[name].alpha_sigma(t.float())
    row = denoiser.prediction.coefficients(alpha, sigma)
    exact_estimate = prediction.solve(row, alpha, sigma, x_t.float(), out.float())
    for value, exact in zip(estimate[:2], exact_estimate, strict=True):
        assert value.dtype == dtype
        assert torch.equal(value, exact.to(dtype))


NETS = {
    "unet": lambda: UNet(2, 2, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_head_channels=8, num_groups=4),
    "dit": lambda: DiT(2, 2, channels=16, depth=1, num_heads=2),
}


@pytest.mark.parametrize("net", NETS)
def test_net_embeds_time_in_float32(net):
    """In bfloat16 the times 999 and 1000 would be one; a converted network embeds them apart, as in float32."""
    built = randomize_weights(NETS[net]())
    times, taken = torch.tensor([999.0, 1000.0]), []
    embed = built.sinusoid
    built.sinusoid = lambda t, dim: taken.append(embed(t, dim)) or taken[-1]
    denoiser = Denoiser(built, schedule.Flow(), prediction.V())
    for dtype in (torch.float32, torch.bfloat16):
        denoiser.to(dtype)(torch.zeros(2, 2, 4, 4, dtype=dtype), times / 1000, Condition())
    with torch.autocast("cpu", torch.bfloat16):
        denoiser.float()(torch.zeros(2, 2, 4, 4), times / 1000, Condition())
    assert [one.dtype for one in taken] == [torch.float32] * 3
    assert all(torch.equal(one, taken[0]) for one in taken)
    assert not torch.equal(taken[0][0], taken[0][1])


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_objective_in_bfloat16_is_near_float64(name, net):
    """Under autocast and with everything in bfloat16 the loss is float32, and off by a few roundings of 2^-8."""
    loss_of = objective.Objective(None, weighting.output)
    x0, eps, t = draw(0, SHAPE), draw(1, SHAPE), torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    cond = Condition()

    def losses(dtype, at=None):
        denoiser = Denoiser(randomize_weights(NETS[net]()).to(dtype), SCHEDULES[name], prediction.V())
        return loss_of.loss_at(denoiser, x0.to(dtype), cond, (t if at is None else t.to(at)), eps.to(dtype))["loss"]

    exact = losses(F64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses(torch.float32, torch.float32)
    for low in (mixed, losses(torch.bfloat16, torch.float32)):
        assert low.dtype == torch.float32
        assert ((low - exact).abs() / exact).max() < 8 * 2**-8
    assert losses(torch.bfloat16, torch.bfloat16).dtype == torch.float32  # at other times: t itself is rounded


@pytest.mark.parametrize("option", [option for group, option in OPTIONS if group == "sampler"])
def test_sampler_stays_in_bfloat16(option):
    """A state in bfloat16 stays in bfloat16; after four steps it is off by three roundings of 2^-8 a step."""
    sample = instantiate(compose_option("sampler", option))
    sched = SCHEDULES["cosine"]
    ts = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.05], dtype=F64)
    rows = {}
    for dtype in (torch.bfloat16, F64):
        denoiser = Denoiser(Recorded(), sched, prediction.V())
        noise = KeyedNoise(0, [0, 1, 2])
        draws = noise.sampler_noise("step")

        def estimate(x, t, denoiser=denoiser):
            assert x.dtype == denoiser.dtype
            answer = denoiser(x, t, Condition())
            return answer._replace(var_frac=torch.zeros_like(x))

        denoiser.dtype = dtype
        rows[dtype] = sample(estimate, sched, draw(2, SHAPE).to(dtype), ts, draws)
        assert rows[dtype].dtype == dtype
    assert (rows[torch.bfloat16].double() - rows[F64]).norm() / rows[F64].norm() < 12 * 2**-8
