"""Samplers against diffusers' schedulers: the same network function, noise and grid give the same end point.

Their quirks, and what reproduces each here:
| theirs | here |
|---|---|
| prev_timestep is t - T // n whatever the grid | n that divides T: then it is the grid's own |
| steps_offset=1 (Stable Diffusion) | times.leading(offset=1) |
| set_alpha_to_one=False (Stable Diffusion): the last step goes to alpha_bar[0], not to 1 | times.ending_at(ts, 1/T) |
| set_alpha_to_one=True | the grid ends at 0 |
| DPM-Solver++ SDE draws its noise in float32 | so does the test |
| DPM-Solver++ and UniPC space `linspace` and `leading` over n + 1 entries and drop the last | written out in `grid` below |
| final_sigmas_type="zero": the last step is of first order | that is what a step to t = 0 is |
| final_sigmas_type="sigma_min" | times.ending_at(ts, 1/T), where the last step keeps its order |
| PNDM, skip_prk_steps: the first timestep's step is made twice, averaging eps | plms' improved Euler start |
| Euler, Heun and ancestral work on x / alpha, and give the network that over sqrt(sigma^2 + 1) | any schedule; x is VP |
| k-diffusion: the same in its own symbols, and churn | the three functions at the end, from Karras et al. 2022, algorithm 2 |
Tables are float32 there; ours, in float64, are put in their place.
"""

import itertools
import math
from functools import partial

import diffusers
import pytest
import torch
from cases import F64
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import prediction, sampler, schedule, times, variance
from ldm.diffusion.denoiser import Denoiser

TABLE = schedule.scaled_linear()
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICT = {"epsilon": prediction.Eps(), "v_prediction": prediction.V(), "sample": prediction.X0()}


class Net(nn.Module):
    """Not linear, bounded, and different at every time."""

    def forward(self, x, time, cond=None):
        time = time.reshape(-1, *[1] * (x.ndim - 1)) if time.ndim else time
        return torch.tanh(0.7 * x + 0.3 * torch.cos(time / 150)) + 0.2 * x.flip(-1)


NET = Net()
X = torch.randn(2, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))


def ours(run, ts, predict="epsilon", table=TABLE, drawn=F64):
    generator = torch.Generator().manual_seed(1)
    denoiser = Denoiser(NET, table, PREDICT[predict])
    noise = lambda x: torch.randn(x.shape, generator=generator, dtype=drawn).to(x)  # noqa: E731
    return run(lambda x, t: denoiser(x, t, Condition()), table, X, ts, noise)


def theirs(cls, n, scaled=False, table=TABLE, **config):
    scheduler = cls(**SD, **config)
    scheduler.alphas_cumprod = table.alpha_bar
    if hasattr(scheduler, "final_alpha_cumprod") and not config.get("set_alpha_to_one", True):
        scheduler.final_alpha_cumprod = table.alpha_bar[0]
    scheduler.set_timesteps(n)
    x = X * (scheduler.sigmas[0].double() ** 2 + 1).sqrt() if scaled else X
    step = {"generator": torch.Generator().manual_seed(1)} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        x = scheduler.step(NET(scheduler.scale_model_input(x, t), t.double()), t, x, **step, **config.get("step", {})).prev_sample
    return x, scheduler


def close(a, b, tolerance=1e-5):
    assert a.dtype == F64
    assert float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("predict", PREDICT)
def test_ddim(n, eta, predict):
    class Ddim(diffusers.DDIMScheduler):
        def step(self, out, t, x, generator=None):
            return super().step(out, t, x, eta=eta, generator=generator)

    run = partial(sampler.ddim, eta=eta)
    config = {"clip_sample": False, "prediction_type": predict}
    x, _ = theirs(Ddim, n, timestep_spacing="leading", **config)
    close(ours(run, times.leading(TABLE, n), predict), x, 1e-9)
    x, _ = theirs(Ddim, n, timestep_spacing="trailing", **config)
    close(ours(run, times.trailing(TABLE, n), predict), x, 1e-9)
    x, _ = theirs(Ddim, n, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, **config)
    close(ours(run, times.ending_at(times.leading(TABLE, n, offset=1), 1e-3), predict), x, 1e-9)


@pytest.mark.parametrize("n", [20, 1000])
@pytest.mark.parametrize(("kind", "choice"), [("fixed_small", variance.small), ("fixed_large", variance.large)])
def test_ddpm(n, kind, choice):
    x, _ = theirs(diffusers.DDPMScheduler, n, variance_type=kind, clip_sample=False)
    close(ours(partial(sampler.ddpm, variance=choice), times.leading(TABLE, n)), x, 1e-8)


def test_ddpm_learned_range():
    class Twice(nn.Module):
        def forward(self, x, time, cond=None):
            return torch.cat([NET(x, time), torch.sin(3 * x)], dim=1)

    scheduler = diffusers.DDPMScheduler(**SD, variance_type="learned_range", clip_sample=False)
    scheduler.alphas_cumprod = TABLE.alpha_bar
    scheduler.set_timesteps(20)
    x, generator = X, torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        x = scheduler.step(Twice()(x, t.double()), t, x, generator=generator).prev_sample
    denoiser, generator = Denoiser(Twice(), TABLE, prediction.Eps()), torch.Generator().manual_seed(1)
    got = sampler.ddpm(
        lambda x, t: denoiser(x, t, Condition()),
        TABLE,
        X,
        times.leading(TABLE, 20),
        lambda x: torch.randn(x.shape, generator=generator, dtype=F64),
        variance=variance.learned_range,
    )
    close(got, x)


def grid(scheduler):
    """The grid that a scheduler's own timesteps and last sigma say."""
    last = float(scheduler.sigmas[-1])
    return torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.tensor([0.0 if last == 0 else 1e-3], dtype=F64)])


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("predict", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("n", [8, 20])
def test_dpmpp_2m_and_unipc(spacing, predict, n):
    config = {"timestep_spacing": spacing, "prediction_type": predict}
    for cls, run in [(diffusers.DPMSolverMultistepScheduler, sampler.dpmpp_2m), (diffusers.UniPCMultistepScheduler, sampler.unipc)]:
        x, scheduler = theirs(cls, n, final_sigmas_type="zero", **config)
        close(ours(run, grid(scheduler), predict), x)
        assert torch.equal(grid(scheduler), times.trailing(TABLE, n)) or spacing != "trailing"


def test_dpmpp_2m_to_final_alpha():
    x, _scheduler = theirs(
        diffusers.DPMSolverMultistepScheduler, 20, final_sigmas_type="sigma_min", lower_order_final=False, timestep_spacing="trailing"
    )
    close(ours(sampler.dpmpp_2m, times.ending_at(times.trailing(TABLE, 20), 1e-3)), x)


def test_dpmpp_2m_sde():
    x, _scheduler = theirs(diffusers.DPMSolverMultistepScheduler, 20, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing")
    close(ours(partial(sampler.dpmpp_2m, eta=1.0), times.trailing(TABLE, 20), drawn=torch.float32), x)


@pytest.mark.parametrize("n", [25, 50])
def test_plms(n):
    x, _ = theirs(diffusers.PNDMScheduler, n, skip_prk_steps=True, steps_offset=1)
    close(ours(sampler.plms, times.ending_at(times.leading(TABLE, n, offset=1), 1e-3)), x)
    x, _ = theirs(diffusers.PNDMScheduler, n, skip_prk_steps=True, set_alpha_to_one=True)
    close(ours(sampler.plms, times.leading(TABLE, n)), x)


# Their linspace is on the table's entries where n - 1 divides 999; between entries they are linear in sigma / alpha.
@pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("linspace", 28), ("leading", 10), ("leading", 25), ("trailing", 25)])
def test_euler_heun_and_ancestral(spacing, n):
    for cls, run in [
        (diffusers.EulerDiscreteScheduler, sampler.euler),
        (diffusers.HeunDiscreteScheduler, sampler.heun),
        (diffusers.EulerAncestralDiscreteScheduler, partial(sampler.ddim, eta=1.0)),
    ]:
        x, scheduler = theirs(cls, n, scaled=True, timestep_spacing=spacing)
        i = scheduler.timesteps.double().unique(sorted=True).flip(0)
        ts = torch.cat([(i + 1) / 1000, torch.zeros(1, dtype=F64)])
        close(ours(run, ts), x)


# k-diffusion's three, in sigma and from Karras et al. 2022, algorithm 2 (with `ancestral` as in Crowson's sampling.py), as float64 loops.
def sigmas(ts):
    alpha, sigma = TABLE.alpha_sigma(ts)
    return sigma / alpha


def D(x, sigma):
    """The denoiser of sigma-space states, through the eps network of the VP one."""
    t = TABLE.t_at(-2 * sigma.log())
    alpha = TABLE.alpha_sigma(t)[0]
    return x - sigma * NET(x * alpha, TABLE.net_time(t))


def algorithm_2(x, sigma, second_order, churn, s_min, s_max, s_noise, noise):
    n = len(sigma) - 1
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if s_min <= sigma[i] <= s_max else 0.0
        hat = sigma[i] * (1 + gamma)
        if gamma:
            x = x + (hat**2 - sigma[i] ** 2).sqrt() * s_noise * noise(x)
        d = (x - D(x, hat)) / hat
        new = x + (sigma[i + 1] - hat) * d
        if second_order and sigma[i + 1] > 0:
            d_new = (new - D(new, sigma[i + 1])) / sigma[i + 1]
            new = x + (sigma[i + 1] - hat) * (d + d_new) / 2
        x = new
    return x


def ancestral(x, sigma, eta, noise):
    for here, there in itertools.pairwise(sigma):
        up = torch.minimum(there, eta * (there**2 * (here**2 - there**2) / here**2).sqrt())
        down = (there**2 - up**2).sqrt()
        x = x + (x - D(x, here)) / here * (down - here)
        if there > 0:
            x = x + noise(x) * up
    return x


@pytest.mark.parametrize("n", [6, 25])
def test_k_diffusion(n):
    ts = times.karras(TABLE, n, sigma_min=0.03, sigma_max=14.0)
    start = TABLE.alpha_sigma(ts[0])[0]

    def noise():
        generator = torch.Generator().manual_seed(1)
        return lambda x: torch.randn(x.shape, generator=generator, dtype=F64)

    churn = {"churn": 5.0, "churn_range": (0.1, 10.0), "churn_noise": 1.01}
    for run, second in [(sampler.euler, False), (sampler.heun, True)]:
        close(ours(run, ts), algorithm_2(X / start, sigmas(ts), second, 0.0, 0, 99, 1, None), 1e-9)
        want = algorithm_2(X / start, sigmas(ts), second, 5.0, 0.1, 10.0, 1.01, noise())
        close(ours(partial(run, **churn), ts), want, 1e-9)
    for eta in (1.0, 0.6):
        close(ours(partial(sampler.ddim, eta=eta), ts), ancestral(X / start, sigmas(ts), eta, noise()), 1e-9)


def test_flow_euler_and_heun():
    """diffusers' flow-matching schedulers step dx/dsigma = velocity; on a flow that is what Euler and Heun do here."""
    for cls, run in [
        (diffusers.FlowMatchEulerDiscreteScheduler, sampler.euler),
        (diffusers.FlowMatchHeunDiscreteScheduler, sampler.heun),
    ]:
        scheduler = cls(shift=3.0)
        scheduler.set_timesteps(12)
        x = X
        for t in scheduler.timesteps:
            x = scheduler.step(NET(x, t.double()), t, x).prev_sample
        flow = schedule.Flow()
        denoiser = Denoiser(NET, flow, prediction.Flow())
        got = run(lambda x, t, d=denoiser: d(x, t, Condition()), flow, X, scheduler.sigmas.double().unique(sorted=True).flip(0), None)
        close(got, x)
