import pytest
import torch
from cases import F64, NO_SIGNAL, PREDICTIONS, SCHEDULES, SHAPES, f64
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import prediction, schedule
from ldm.diffusion.denoiser import Denoised, Denoiser, eps_at

PAIRS = [(s, p) for s in SCHEDULES for p in PREDICTIONS if not (p == "eps" and s in NO_SIGNAL)]


@pytest.mark.parametrize(("sched", "pred"), PAIRS)
def test_prediction_round_trip(sched, pred):
    t = f64(0.05, 0.4, 0.93)
    alpha, sigma = SCHEDULES[sched].alpha_sigma(t)
    row = PREDICTIONS[pred].coefficients(alpha, sigma)
    for shape in SHAPES:
        x0, eps = torch.randn(2, *shape, dtype=F64, generator=torch.Generator().manual_seed(0))
        wide = (3,) + (1,) * (len(shape) - 1)
        x_t = alpha.view(wide) * x0 + sigma.view(wide) * eps
        out = prediction.target(row, x0, eps)
        got_x0, got_eps = prediction.solve(row, alpha, sigma, x_t, out)
        # conditioning: at t = 0.05 sigma is small, at t = 0.93 alpha is
        assert torch.allclose(got_x0, x0, rtol=1e-12, atol=1e-12 * float((x_t.abs().max() / alpha.min()).clamp(min=1)))
        assert torch.allclose(
            got_eps, eps, rtol=1e-12, atol=1e-12 * float((x_t.abs().max() / sigma.min()).clamp(min=1))
        )
        wrong = out + 1e-3
        error = ((prediction.solve(row, alpha, sigma, x_t, wrong)[0] - x0) ** 2).flatten(1).mean(1)
        assert torch.allclose(1e-6 / error, prediction.output_gain(row, alpha, sigma), rtol=1e-6)


def test_prediction_targets_match_papers():
    alpha, sigma, x0, eps = f64(0.8), f64(0.6), f64(2.0), f64(-3.0)
    want = {"eps": -3.0, "x0": 2.0, "v": 0.8 * -3 - 0.6 * 2, "flow": -3.0 - 2.0}
    for name, value in want.items():
        assert prediction.target(PREDICTIONS[name].coefficients(alpha, sigma), x0, eps) == pytest.approx(value)


def test_edm_prediction_matches_table_1():
    s, sigma = 0.5, f64(0.01, 0.7, 30.0)
    alpha, x0, eps = torch.ones_like(sigma), f64(0.3, -0.4, 1.1), f64(1.0, -2.0, 0.5)
    y = x0 + sigma * eps
    c_skip, c_out, c_in = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2).sqrt(), 1 / (sigma**2 + s**2).sqrt()
    edm = prediction.EDM(s)
    out = prediction.target(edm.coefficients(alpha, sigma), x0, eps)
    assert torch.allclose(out, (x0 - c_skip * y) / c_out, rtol=1e-9)  # eq. 8
    assert torch.allclose(edm.input_scale(alpha, sigma), c_in)
    anything = f64(0.2, 0.5, -1.0)
    assert torch.allclose(
        prediction.solve(edm.coefficients(alpha, sigma), alpha, sigma, y, anything)[0], c_skip * y + c_out * anything
    )  # eq. 7


def test_edm_prediction_on_unit_variance_schedule_is_minus_v():
    alpha, sigma = schedule.cosine().alpha_sigma(f64(0.1, 0.6, 0.99))
    for ours, v in zip(
        prediction.EDM(1.0).coefficients(alpha, sigma), prediction.V().coefficients(alpha, sigma), strict=True
    ):
        assert torch.allclose(ours, -v, atol=1e-12)
    assert all(
        torch.equal(p.input_scale(alpha, sigma), torch.ones_like(alpha)) for n, p in PREDICTIONS.items() if n != "edm"
    )


@pytest.mark.parametrize("sched", NO_SIGNAL)
def test_denoiser_rejects_eps_without_signal(sched):
    with pytest.raises(ValueError, match=r"Eps does not determine x0 at t = 1.*use v, flow or x0"):
        Denoiser(nn.Identity(), SCHEDULES[sched], prediction.Eps())
    for name in ("v", "flow", "x0", "edm"):
        Denoiser(nn.Identity(), SCHEDULES[sched], PREDICTIONS[name])


def test_denoiser_rejects_singular_prediction():
    """An output that is x_t itself leaves x0 open whatever the schedule."""

    class State(prediction.X0):
        def coefficients(self, alpha, sigma):
            return alpha, sigma

    for sched in (schedule.EDM(), schedule.linear()):
        with pytest.raises(ValueError, match="State does not determine x0"):
            Denoiser(nn.Identity(), sched, State())


class Recorder(nn.Module):
    def __init__(self, factor=1):
        super().__init__()
        self.factor = factor

    def forward(self, x, time, cond):
        self.seen = x, time, cond
        return torch.cat([k * x for k in range(1, self.factor + 1)], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_denoiser_matches_prediction(shape):
    net, cond = Recorder(), Condition(vector=torch.zeros(3, 1))
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(net, schedule.EDM(), prediction.EDM(0.5))
    one, many = denoiser(x_t, torch.tensor(0.02), cond), denoiser(x_t, torch.full((3,), 0.02), cond)
    assert torch.allclose(one.x0, many.x0)
    assert torch.allclose(one.eps, many.eps)
    assert one.var_frac is None
    x, time, told = net.seen
    assert told is cond
    assert time.shape == (3,)
    assert torch.allclose(x, x_t / (1.6**2 + 0.25) ** 0.5)
    assert torch.allclose(one.x0 + 1.6 * one.eps, x_t, atol=1e-5)
    assert torch.allclose(eps_at(denoiser.schedule, x_t, torch.tensor(0.02), one.x0), one.eps, atol=1e-5)


def test_denoiser_splits_doubled_output():
    x_t = torch.randn(3, 2, 4)
    net = Recorder(2)
    denoised = Denoiser(net, schedule.linear(), prediction.X0())(x_t, torch.tensor(0.5), Condition())
    assert torch.allclose(denoised.x0, x_t, atol=1e-6)
    assert torch.equal(denoised.var_frac, 2 * x_t)
    assert Denoised._fields == ("x0", "eps", "var_frac")


def test_denoiser_net_time_is_integer_in_any_precision():
    net = Recorder()
    denoiser = Denoiser(net, schedule.linear(), prediction.X0())
    for dtype in (torch.bfloat16, torch.float32, F64):
        for t in (torch.tensor(1.0, dtype=F64), torch.tensor([0.999, 1.0])):
            denoiser(torch.zeros(2, 1, dtype=dtype), t, Condition())
            assert net.seen[1][-1] == 999
            assert net.seen[1].dtype == (F64 if dtype == F64 else torch.float32)
