from functools import partial

import pytest
import torch
from cases import F64, PREDICTIONS, SCHEDULES, SHAPES, f64
from oracle import Gaussian
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import objective, prediction, schedule, times, variance, weighting
from ldm.diffusion.denoiser import Denoised, Denoiser
from ldm.diffusion.input_perturbation import InputPerturbation
from ldm.tensors import KeyedNoise

DISCRETE = partial(times.independent, density=times.discrete)
NOISE = KeyedNoise(0, range(3))


class Net(nn.Module):
    def __init__(self, channels=2, factor=1):
        super().__init__()
        self.mix = nn.Linear(channels, factor * channels, dtype=F64)

    def forward(self, x, time, cond):
        return self.mix(x.movedim(1, -1)).movedim(-1, 1) + (time / 1000).view(-1, *[1] * (x.ndim - 1))


def data(shape=(3, 2, 4, 4), seed=0):
    return torch.randn(2, *shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def make(pred="v", sched="cosine", factor=1, channels=2):
    torch.manual_seed(0)
    return Denoiser(Net(channels, factor), SCHEDULES[sched], PREDICTIONS[pred])


@pytest.mark.parametrize("shape", [(3, 2), *SHAPES[1:]])
def test_objective_loss_is_weighted_output_error(shape):
    d, (x0, eps), t = make(), data(shape), f64(0.1, 0.5, 0.9)
    terms = objective.Objective(DISCRETE, weighting.min_snr).loss_at(d, x0, Condition(), t, eps)
    alpha, sigma = (c.view(3, *[1] * (len(shape) - 1)) for c in d.schedule.alpha_sigma(t))
    out = d.net(alpha * x0 + sigma * eps, 1000 * t - 1, None)
    error = (out - (alpha * eps - sigma * x0)).square().flatten(1).mean(1)
    snr = ((alpha / sigma) ** 2).flatten()
    assert torch.allclose(terms["error"], error)
    assert torch.allclose(terms["loss"], snr.clamp(max=5) / (snr + 1) * error)


@pytest.mark.parametrize(
    "weigh", [weighting.eps, weighting.x0, weighting.v, weighting.flow, weighting.min_snr, weighting.edm]
)
def test_weighting_gives_equal_loss_for_every_prediction(weigh):
    """For one and the same estimate of x0; only `output` depends on what the network predicts."""
    (x0, eps), t = data(), f64(0.1, 0.5, 0.9)
    losses = []
    for pred in PREDICTIONS.values():
        d = Denoiser(nn.Identity(), schedule.cosine(), pred)
        alpha, sigma = (c.view(3, 1, 1, 1) for c in d.schedule.alpha_sigma(t))
        x_t = alpha * x0 + sigma * eps
        estimate = 0.9 * x0 + 0.1
        a, b = (c.view(3, 1, 1, 1) for c in pred.coefficients(*d.schedule.alpha_sigma(t)))
        d.net.forward = lambda x, time, cond, out=a * estimate + b * (x_t - alpha * estimate) / sigma: out
        losses.append(objective.Objective(DISCRETE, weigh).loss_at(d, x0, Condition(), t, eps)["loss"])
    assert all(torch.allclose(losses[0], other) for other in losses[1:])


def test_objective_forward_uses_keyed_times_and_noise():
    d, (x0, _) = make(), data()
    run = objective.Objective(DISCRETE, weighting.output)
    terms = run(d, x0, Condition(), NOISE, {})
    t, eps = run.draw(NOISE, x0, d.schedule)
    assert torch.equal(terms["loss"], run.loss_at(d, x0, Condition(), t, eps)["loss"])
    assert t.dtype == F64
    one = run(d, x0[1:2], Condition(), KeyedNoise(0, [1]), {})
    assert torch.allclose(one["loss"], terms["loss"][1:2])
    assert set(terms) == {"loss", "error", "t"}
    assert torch.equal(eps, NOISE.normal("eps", x0))


def test_objective_is_minimized_by_exact_denoiser():
    """Its error of x0 is Var[x0 | x_t], and any other estimate's is more."""
    g = Gaussian(schedule.cosine(), mean=0.5, std=0.8)

    def net(scale):
        d = Denoiser(nn.Identity(), g.schedule, prediction.X0())
        d.net.forward = lambda x, time, cond: scale * g(x, (time[0] + 1) / 1000).x0
        return d

    n, t = 4000, torch.full((4000,), 0.5, dtype=F64)
    x0 = 0.5 + 0.8 * torch.randn(n, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(n, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    loss = {
        s: float(objective.Objective(DISCRETE, weighting.x0).loss_at(net(s), x0, Condition(), t, eps)["loss"].mean())
        for s in (0.9, 1.0, 1.1)
    }
    assert loss[1.0] == pytest.approx(float(g.posterior_variance(t[0])), rel=0.03)
    assert loss[0.9] > loss[1.0] < loss[1.1]


def test_error_functions_match_formulas():
    out, wanted = f64(7.0, 1.5, 2.0), f64(7.0, 2.0, -1.0)
    assert objective.l2(out, wanted).tolist() == [0, 0.25, 9]
    assert objective.l1(out, wanted).tolist() == [0, 0.5, 3]
    assert objective.huber(out, wanted).tolist() == pytest.approx([0, 0.125, 2.5])
    assert objective.huber(out, wanted, delta=2.0).tolist() == pytest.approx([0, 0.125, 4])
    d, (x0, eps), t = make(), data(), f64(0.1, 0.5, 0.9)
    l1 = objective.Objective(DISCRETE, weighting.output, error=objective.l1).loss_at(d, x0, Condition(), t, eps)
    l2 = objective.Objective(DISCRETE, weighting.output).loss_at(d, x0, Condition(), t, eps)
    assert (l1["loss"] ** 2 < l2["loss"]).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_offset_noise_shifts_channels(shape):
    x0, noise = torch.zeros(shape), KeyedNoise(5, range(3))
    moved = objective.offset(noise, x0, strength=0.3) - objective.gaussian(noise, x0)
    by_channel = moved.reshape(*shape[:2], -1)
    first = noise.normal("offset", by_channel[..., :1] if len(shape) > 2 else x0)
    assert torch.allclose(by_channel[..., 0], 0.3 * first.reshape(shape[:2]), atol=1e-6)
    assert torch.allclose(by_channel, by_channel[..., :1].expand(by_channel.shape), atol=1e-6)
    draws = torch.stack(
        [
            (objective.offset(KeyedNoise(k, [0]), x0[:1], 0.3) - objective.gaussian(KeyedNoise(k, [0]), x0[:1]))[
                0
            ].flatten()[0]
            for k in range(800)
        ]
    )
    assert float(draws.std()) == pytest.approx(0.3, rel=0.1)
    assert float(draws.mean()) == pytest.approx(0, abs=0.04)


def test_hybrid_loss_trains_variance_by_bound_and_mean_by_error():
    (x0, eps), t = data(), f64(0.001, 0.5, 0.9)
    grads = {}
    for vlb in (0.0, 0.001, 0.002):
        d = make("eps", "linear", factor=2)
        terms = objective.Objective(DISCRETE, weighting.eps, vlb=vlb).loss_at(d, x0, Condition(), t, eps)
        terms["loss"].sum().backward()
        grads[vlb] = d.net.mix.weight.grad
    mean, var = slice(0, 2), slice(2, 4)
    assert torch.equal(grads[0.001][mean], grads[0.0][mean])
    assert grads[0.0][var].eq(0).all()
    assert grads[0.001][var].abs().min() > 0
    assert torch.allclose(grads[0.002][var], 2 * grads[0.001][var])
    assert torch.allclose(terms["loss"], terms["error"] + 0.002 * terms["vlb"])


@pytest.mark.parametrize("t", [0.002, 0.5, 1.0])
def test_learned_range_gradient_matches_closed_form(t):
    """d KL / d var_frac = (1 - (var_q + (mean_q - mean_p)^2) / var_p) / 2 * (log large - log small) / 2."""
    sched = schedule.linear()
    (x0, eps), (t, s) = data(), (f64(t)[0], f64(t - 1e-3)[0])
    alpha, sigma = sched.alpha_sigma(t)
    x_t, frac = alpha * x0 + sigma * eps, torch.full_like(x0, 0.2, requires_grad=True)
    guess = (0.8 * x0).requires_grad_()
    estimate = Denoised(guess.detach(), eps, frac)
    bits = variance.vlb_term(sched, x0, x_t, t, s, estimate, variance.learned_range, variance.gaussian_nll)
    bits.sum().backward()
    lo, hi = variance.fixed_small(None, sched, t, s), variance.fixed_large(None, sched, t, s)
    var_p = (0.6 * hi + 0.4 * lo).exp()
    (mean_q, var_q), (mean_p, _) = (variance.q_posterior(sched, v, x_t, t, s) for v in (x0, 0.8 * x0))
    want = (
        (1 - (var_q + (mean_q - mean_p) ** 2) / var_p)
        / 2
        * (hi - lo)
        / 2
        / x0[0].numel()
        / torch.tensor(2.0, dtype=F64).log()
    )
    assert torch.allclose(frac.grad, want, rtol=1e-6)
    assert guess.grad is None


def test_vlb_estimate_is_unbiased():
    """T times the term, averaged over every t, is the sum of all terms: bits per dimension, its prior aside."""
    table = schedule.linear(40)
    g, (x0, _) = Gaussian(table, 0.2, 0.7), data((1, 4))
    t = torch.arange(1, 41, dtype=F64) / 40
    eps = torch.randn(40, 4, dtype=F64, generator=torch.Generator().manual_seed(3))
    alpha, sigma = (c[:, None] for c in table.alpha_sigma(t))
    x_t = alpha * x0 + sigma * eps
    for time in (t, t.float()):  # float32 times find their entries
        bits = objective.vlb_estimate(
            table, x0.expand(40, 4), x_t, time, g(x_t, t), variance.fixed_small, variance.gaussian_nll
        )
        draws = iter(eps.flip(0)[:, None])
        ts = torch.cat([t.flip(0), f64(0.0)])
        whole = variance.bits_per_dim(g, table, x0, ts, lambda x, d=draws: next(d), decoder=variance.gaussian_nll)
        assert torch.allclose(bits.mean(), whole["terms"].sum(), rtol=1e-9)
        assert bits.dtype == F64


def test_vlb_stays_in_float32():
    d = make("eps", "linear", factor=2).float()
    run = objective.Objective(DISCRETE, weighting.eps, vlb=0.001, decoder=variance.decoder_nll)
    x0 = data()[0].float().clamp(-1, 1)
    assert {v.dtype for v in run(d, x0, Condition(), NOISE, {}).values()} == {torch.float32}
    assert all(v.isfinite().all() for v in run(d, x0, Condition(), NOISE, {}).values())
    with pytest.raises(ValueError, match="twice the channels of x_t"):
        run(make("eps", "linear").float(), x0, Condition(), NOISE, {})


def test_vlb_rejects_times_between_entries():
    d, (x0, eps) = make("eps", "linear", factor=2), data()
    run = objective.VLBObjective(DISCRETE)
    entry = torch.tensor([0.001, 0.333, 1.0])  # float32, as drawn
    assert run.loss_at(d, x0, Condition(), entry, eps)["loss"].isfinite().all()
    for between in (0.0003, 0.3334, 0.99985):
        with pytest.raises(ValueError, match="sum over the schedule's 1000 entries"):
            run.loss_at(d, x0, Condition(), torch.tensor([0.001, between, 1.0]), eps)


def test_vlb_objective_equals_hybrid_terms():
    d, (x0, eps), t = make("eps", "linear", factor=2), data(), f64(0.001, 0.5, 0.9)
    run = objective.VLBObjective(DISCRETE)
    got = run.loss_at(d, x0, Condition(), t, eps)["loss"]
    hybrid = objective.Objective(DISCRETE, weighting.eps, vlb=1.0).loss_at(d, x0, Condition(), t, eps)
    assert torch.allclose(got, hybrid["vlb"])
    got.sum().backward()
    assert d.net.mix.weight.grad[:2].abs().min() > 0  # here the mean is trained by the bound
    assert run(d, x0, Condition(), NOISE, {})["loss"].shape == (3,)


def test_log_variance_converges_to_log_loss():
    d, (x0, eps), t = make(), data(), f64(0.0005, 0.3, 1.0)
    run = objective.LogVariance(objective.Objective(DISCRETE, weighting.output), T=10, init=0.5).double()
    terms = run.loss_at(d, x0, Condition(), t, eps)
    assert torch.allclose(terms["loss"], terms["balanced"] / f64(0.5).exp() + 0.5)
    assert objective.bin_of(t, 10).tolist() == [0, 2, 9]
    with torch.no_grad():
        run.log_variance[[0, 2, 9]] = terms["balanced"].log()
    run.loss_at(d, x0, Condition(), t, eps)["loss"].sum().backward()
    assert torch.allclose(run.log_variance.grad, torch.zeros(10, dtype=F64), atol=1e-12)
    assert run(d, x0, Condition(), NOISE, {})["loss"].shape == (3,)
    assert [n for n, _ in run.named_parameters()] == ["log_variance"]


@pytest.mark.parametrize("T", [10, 1000, 4000])
def test_bin_of_maps_times_to_entries(T):
    i = torch.arange(T)
    assert torch.equal(objective.bin_of((i + 1) / T, T), i)
    assert objective.bin_of(torch.tensor([2.0**-24]), T) == 0
    assert torch.equal(objective.bin_of((i + 0.5) / T, T), i)


class Losses(nn.Module):
    """An objective whose loss at index i is known."""

    def draw(self, noise, x0, schedule):
        return None, x0

    def loss_at(self, denoiser, x0, cond, t, eps):
        return {"loss": (t * 4).round() ** 2}


def test_second_moment_samples_in_proportion_and_is_unbiased():
    d = Denoiser(nn.Identity(), schedule.cosine(4), prediction.V())
    run = objective.LossSecondMoment(Losses(), T=4, history=3, floor=0.1)
    assert torch.allclose(run.probabilities(), torch.full((4,), 0.25, dtype=F64))
    run.update_history(torch.tensor([0, 1, 2, 3] * 2), torch.tensor([1.0, 4, 9, 16] * 2))
    assert torch.allclose(run.probabilities(), torch.full((4,), 0.25, dtype=F64))  # two each: not full yet
    run.update_history(torch.tensor([3, 2, 1, 0]), torch.tensor([16.0, 9, 4, 1]))
    want = 0.9 * f64(1, 4, 9, 16) / 30 + 0.1 / 4
    assert torch.allclose(run.probabilities(), want)
    n = 8000
    terms = run.eval()(d, torch.zeros(n, 1), Condition(), KeyedNoise(0, range(n)), {})
    assert float(terms["loss"].mean()) == pytest.approx(7.5, rel=0.02)  # the mean of 1, 4, 9, 16
    kinds = terms["loss"].unique()
    assert torch.allclose(kinds, (f64(1, 4, 9, 16) / (4 * want)).sort().values.float())
    counts = torch.tensor([torch.isclose(terms["loss"], k).sum() for k in (f64(1, 4, 9, 16) / (4 * want)).float()]) / n
    assert torch.allclose(counts.double(), want, atol=0.02)


def test_second_moment_history_keeps_latest():
    run = objective.LossSecondMoment(Losses(), T=3, history=2)
    run.update_history(torch.tensor([1, 1, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 7.0]))
    assert sorted(run.losses[1].tolist()) == [2, 3]
    assert run.losses[0].tolist() == [7, 0]
    assert run.count.tolist() == [1, 3, 0]
    run.update_history(torch.tensor([1, 0]), torch.tensor([4.0, 8.0]))
    assert sorted(run.losses[1].tolist()) == [3, 4]
    assert sorted(run.losses[0].tolist()) == [7, 8]
    longer = objective.LossSecondMoment(Losses(), T=2, history=3)
    longer.update_history(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
    longer.update_history(torch.tensor([1]), torch.tensor([3.0]))
    assert longer.losses[1].tolist() == [1, 2, 3]
    rms = ((f64(7, 3, 0) ** 2 + f64(8, 4, 0) ** 2) / 2).sqrt()
    run.count.fill_(2)
    assert torch.allclose(run.probabilities(), 0.999 * rms / rms.sum() + 0.001 / 3)


def test_second_moment_updates_only_in_training_and_checks_steps():
    d, (x0, _) = make("eps", "linear", factor=2), data()
    run = objective.LossSecondMoment(objective.VLBObjective(DISCRETE), T=1000)
    run.eval()(d, x0, Condition(), NOISE, {})
    assert run.count.sum() == 0
    terms = run.train()(d, x0, Condition(), NOISE, {})
    assert run.count.sum() == 3
    assert not run.losses.requires_grad
    assert terms["loss"].requires_grad
    other = objective.LossSecondMoment(objective.VLBObjective(DISCRETE), T=1000)
    other.load_state_dict(run.state_dict())
    assert torch.equal(other.losses, run.losses)
    assert torch.equal(other.count, run.count)
    with pytest.raises(ValueError, match="the schedule has T = 1000, the objective T = 500; set"):
        objective.LossSecondMoment(objective.VLBObjective(DISCRETE), T=500)(d, x0, Condition(), NOISE, {})


def test_gather_is_identity_in_one_process():
    x = torch.arange(3)
    assert objective.gather(x) is x


def test_gather_concatenates_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", lambda out, x: out.copy_(torch.cat([x, x + 10])))
    assert objective.gather(torch.arange(3)).tolist() == [0, 1, 2, 10, 11, 12]


def rank(number, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2)
    run = objective.LossSecondMoment(Losses(), T=3, history=2)
    run.update_history(torch.tensor([number, 2]), torch.tensor([1.0 + number, 5.0]))
    torch.save(run.losses, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_second_moment_history_is_equal_on_all_ranks(tmp_path):
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)
    for number in (0, 1):
        assert torch.load(tmp_path / f"{number}.pt").tolist() == [[1, 0], [2, 0], [5, 5]]


def test_training_converges_to_exact_denoiser():
    """A linear network trained by the objective on Gaussian data finds E[x0 | x_t]: the whole path, and learning."""
    torch.manual_seed(0)
    flow = schedule.Flow()
    d = Denoiser(Affine(), flow, prediction.Flow())
    run = objective.Objective(partial(times.stratified, density=times.uniform), weighting.output)
    g = Gaussian(flow, 0.5, 0.6)
    opt = torch.optim.Adam(d.parameters(), lr=0.03)
    for step in range(200):
        noise = KeyedNoise(0, [(step, i) for i in range(128)])
        x0 = 0.5 + 0.6 * noise.normal("data", torch.empty(128, 1))
        loss = run(d, x0, Condition(), noise, {})["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    x = torch.linspace(-1, 1.5, 5)[:, None]
    for t in (0.25, 0.5, 0.75):
        assert torch.allclose(d(x, torch.tensor(t), Condition()).x0, g(x, torch.tensor(t)).x0, atol=0.1)


class Affine(nn.Module):
    """out = a(t) x + b(t), a and b linear between 9 knots."""

    def __init__(self):
        super().__init__()
        self.knots = nn.Parameter(torch.zeros(9, 2))

    def forward(self, x, time, cond):
        place = time / 1000 * 8
        i = place.floor().clamp(max=7).long()
        a, b = torch.lerp(self.knots[i], self.knots[i + 1], (place - i)[:, None]).unbind(1)
        return a[:, None] * x + b[:, None]


def test_nearest_noise_is_the_nearest_of_its_candidates_for_each_row():
    x0 = data()[0]
    drawn = [NOISE.normal("eps", x0), *(NOISE.normal(f"eps/{i}", x0) for i in (1, 2))]
    got = objective.nearest(NOISE, x0, candidates=3)
    for row in range(3):
        best = min((eps[row] for eps in drawn), key=lambda eps: float(((eps - x0[row]) ** 2).sum()))
        assert torch.equal(got[row], best)
    assert torch.equal(objective.nearest(NOISE, x0, candidates=1), drawn[0])
    assert torch.equal(objective.nearest(KeyedNoise(0, [2]), x0[2:], candidates=3)[0], got[2])  # whatever the batch


def test_input_perturbation_adds_noise_to_the_input_alone():
    d, x0, t = make(), data()[0], f64(0.1, 0.5, 0.9)
    plain = objective.Objective(lambda noise, x0, schedule: t, weighting.v)
    terms = InputPerturbation(plain, gamma=0.25)(d, x0, Condition(), NOISE, {})
    alpha, sigma = (c.view(3, 1, 1, 1) for c in d.schedule.alpha_sigma(t))
    eps, xi = NOISE.normal("eps", x0), NOISE.normal("input_perturbation", x0)
    out = d.net(alpha * x0 + sigma * (eps + 0.25 * xi), 1000 * t - 1, None)
    torch.testing.assert_close(terms["error"], (out - (alpha * eps - sigma * x0)).square().flatten(1).mean(1))
    still = InputPerturbation(plain, gamma=0.0)(d, x0, Condition(), NOISE, {})
    assert torch.equal(still["loss"], plain.loss_at(d, x0, Condition(), t, eps)["loss"])


def test_debiased_weight_divides_the_error_of_eps_by_sqrt_snr():
    alpha, sigma = schedule.cosine().alpha_sigma(f64(0.1, 0.5, 0.9))
    row = prediction.Eps().coefficients(alpha, sigma)
    torch.testing.assert_close(weighting.debiased(alpha, sigma, row) / weighting.eps(alpha, sigma, row), sigma / alpha)
