"""Samplers against diffusers' schedulers, and k-diffusion's as recorded: the same network function, noise and grid give
the same end point.

Their quirks, and what reproduces each here:
| theirs | here |
|---|---|
| prev_timestep is t - T // n whatever the grid | n that divides T: then it is the grid's own |
| steps_offset=1 (Stable Diffusion) | times.leading(offset=1) |
| set_alpha_to_one=False (Stable Diffusion): the last step goes to alpha_bar[0], not to 1 | times.ending_at(ts, 1/T) |
| set_alpha_to_one=True | the grid ends at 0 |
| DPM-Solver++ SDE draws its noise in float32 | so does the test |
| DPM-Solver++ and UniPC space `linspace` and `leading` over n + 1 entries and drop the last | written out in `grid`
below |
| final_sigmas_type="zero": the last step is of first order | that is what a step to t = 0 is |
| final_sigmas_type="sigma_min" | times.ending_at(ts, 1/T), where the last step keeps its order |
| PNDM, skip_prk_steps: the first timestep's step is made twice, averaging eps | plms' improved Euler start |
| Euler, Heun and ancestral work on x / alpha, and give the network that over sqrt(sigma^2 + 1) | any schedule; x is VP
|
| k-diffusion: x / alpha too; get_sigmas(n) is even in i from T - 1 to 0, then 0 | times.linspace, where n - 1 divides T
- 1 |
| k-diffusion: between entries log(sigma / alpha) is linear in i, and so is the time that the network sees | grids on
the entries |
| k-diffusion: get_sigmas_karras is float32 | times.karras, to that |
| k-diffusion: Euler and Heun draw noise in every step, also where s_churn adds none | drawn where it is added; the test
skips theirs |
| k-diffusion: the last step, to sigma = 0, is of first order; Euler-ancestral | a step to t = 0; DDIM at eta |
Tables are float32 there; ours, in float64, are put in their place.
"""

import json
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from cases import F64, Net, draw, f64
from torch import nn

from ldm.condition import Condition
from ldm.diffusion import grids, prediction, sampler, schedule, variance
from ldm.diffusion.denoiser import Denoiser

TABLE = schedule.scaled_linear()
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICT = {"epsilon": prediction.Eps(), "v_prediction": prediction.V(), "sample": prediction.X0()}


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
        x = scheduler.step(
            NET(scheduler.scale_model_input(x, t), t.double()), t, x, **step, **config.get("step", {})
        ).prev_sample
    return x, scheduler


def close(a, b, tolerance=1e-5):
    assert a.dtype == F64
    assert float((a - b).abs().max() / b.abs().max()) < tolerance


@pytest.mark.parametrize("n", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("predict", PREDICT)
def test_ddim_matches_diffusers(n, eta, predict):
    class Ddim(diffusers.DDIMScheduler):
        def step(self, out, t, x, generator=None):
            return super().step(out, t, x, eta=eta, generator=generator)

    run = partial(sampler.ddim, eta=eta)
    config = {"clip_sample": False, "prediction_type": predict}
    x, _ = theirs(Ddim, n, timestep_spacing="leading", **config)
    close(ours(run, grids.leading(TABLE, n), predict), x, 1e-9)
    x, _ = theirs(Ddim, n, timestep_spacing="trailing", **config)
    close(ours(run, grids.trailing(TABLE, n), predict), x, 1e-9)
    x, _ = theirs(Ddim, n, timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False, **config)
    close(ours(run, grids.replace_end(grids.leading(TABLE, n, offset=1), 1e-3), predict), x, 1e-9)


@pytest.mark.parametrize("n", [20, 1000])
@pytest.mark.parametrize(
    ("kind", "choice"), [("fixed_small", variance.fixed_small), ("fixed_large", variance.fixed_large)]
)
def test_ddpm_matches_diffusers(n, kind, choice):
    x, _ = theirs(diffusers.DDPMScheduler, n, variance_type=kind, clip_sample=False)
    close(ours(partial(sampler.ddpm, variance=choice), grids.leading(TABLE, n)), x, 1e-8)


def test_ddpm_learned_range_matches_diffusers():
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
        grids.leading(TABLE, 20),
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
def test_dpmpp_2m_and_unipc_match_diffusers(spacing, predict, n):
    config = {"timestep_spacing": spacing, "prediction_type": predict}
    for cls, run in [
        (diffusers.DPMSolverMultistepScheduler, sampler.dpmpp_2m),
        (diffusers.UniPCMultistepScheduler, sampler.unipc),
    ]:
        x, scheduler = theirs(cls, n, final_sigmas_type="zero", **config)
        close(ours(run, grid(scheduler), predict), x)
        assert torch.equal(grid(scheduler), grids.trailing(TABLE, n)) or spacing != "trailing"


def test_dpmpp_2m_to_final_alpha_matches_diffusers():
    x, _scheduler = theirs(
        diffusers.DPMSolverMultistepScheduler,
        20,
        final_sigmas_type="sigma_min",
        lower_order_final=False,
        timestep_spacing="trailing",
    )
    close(ours(sampler.dpmpp_2m, grids.replace_end(grids.trailing(TABLE, 20), 1e-3)), x)


def test_dpmpp_2m_sde_matches_diffusers():
    x, _scheduler = theirs(
        diffusers.DPMSolverMultistepScheduler, 20, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"
    )
    close(ours(partial(sampler.dpmpp_2m, eta=1.0), grids.trailing(TABLE, 20), drawn=torch.float32), x)


@pytest.mark.parametrize("n", [25, 50])
def test_plms_matches_diffusers(n):
    x, _ = theirs(diffusers.PNDMScheduler, n, skip_prk_steps=True, steps_offset=1)
    close(ours(sampler.plms, grids.replace_end(grids.leading(TABLE, n, offset=1), 1e-3)), x)
    x, _ = theirs(diffusers.PNDMScheduler, n, skip_prk_steps=True, set_alpha_to_one=True)
    close(ours(sampler.plms, grids.leading(TABLE, n)), x)


# Their linspace is on the table's entries where n - 1 divides 999; between entries they are linear in sigma / alpha.
@pytest.mark.parametrize(
    ("spacing", "n"), [("linspace", 10), ("linspace", 28), ("leading", 10), ("leading", 25), ("trailing", 25)]
)
def test_euler_heun_and_ancestral_match_diffusers(spacing, n):
    for cls, run in [
        (diffusers.EulerDiscreteScheduler, sampler.euler),
        (diffusers.HeunDiscreteScheduler, sampler.heun),
        (diffusers.EulerAncestralDiscreteScheduler, partial(sampler.ddim, eta=1.0)),
    ]:
        x, scheduler = theirs(cls, n, scaled=True, timestep_spacing=spacing)
        i = scheduler.timesteps.double().unique(sorted=True).flip(0)
        ts = torch.cat([(i + 1) / 1000, torch.zeros(1, dtype=F64)])
        close(ours(run, ts), x)


RECORDED = json.loads(Path(__file__).with_name("k_diffusion.json").read_text())  # by record_k_diffusion.py
CHURN = {"s_churn": 5.0, "s_range": (0.1, 10.0), "s_noise": 1.01}
RUNS = {
    "euler": sampler.euler,
    "heun": sampler.heun,
    "ancestral": partial(sampler.ddim, eta=1.0),
    "ancestral_eta": partial(sampler.ddim, eta=0.6),
    "dpmpp_2m": sampler.dpmpp_2m,
    "dpmpp_2m_sde": partial(sampler.dpmpp_2m, eta=1.0),
    "dpmpp_2m_sde_eta": partial(sampler.dpmpp_2m, eta=0.6),
    "euler_churn": partial(sampler.euler, **CHURN),
    "heun_churn": partial(sampler.heun, **CHURN),
}


def k_diffusion(run, sched, ts, sigmas):
    """Ours from k-diffusion's start, sigmas[0] draws of x / alpha, with its noise: the k-th draw in its k-th step that
    draws.
    """
    lo, hi = CHURN["s_range"]
    drawn = (k for k, sigma in enumerate(sigmas[:-1], 1) if "churn" not in run or lo <= sigma <= hi)
    denoiser = Denoiser(NET, sched, prediction.Eps())
    x = sched.alpha_sigma(ts[0])[0] * sigmas[0] * draw(0)
    return RUNS[run](lambda x, t: denoiser(x, t, Condition()), sched, x, ts, lambda x: draw(next(drawn)))


@pytest.mark.parametrize("n", RECORDED["table"])
@pytest.mark.parametrize("run", [run for run in RUNS if "churn" not in run])
def test_samplers_match_k_diffusion_on_table(run, n):
    """DiscreteEpsDDPMDenoiser and its own get_sigmas(n), on Stable Diffusion's table."""
    ts = grids.linspace(TABLE, int(n))
    alpha, sigma = TABLE.alpha_sigma(ts)
    close(k_diffusion(run, TABLE, ts, sigma / alpha), f64(*RECORDED["table"][n][run]), 1e-9)


@pytest.mark.parametrize("n", RECORDED["vp"])
@pytest.mark.parametrize("run", RUNS)
def test_samplers_match_k_diffusion_on_karras_grid(run, n):
    """A denoiser of sigma that is Song's continuous VP process, on get_sigmas_karras(n, 0.03, 14), which is float32
    there.
    """
    sched, sigmas = schedule.VP(), f64(*RECORDED["vp"][n]["sigmas"])
    ts = sched.t_from_log_snr(-2 * sigmas.log())
    assert torch.allclose(ts, grids.karras(sched, int(n), 0.03, 14.0), rtol=1e-5)
    close(k_diffusion(run, sched, ts, sigmas), f64(*RECORDED["vp"][n][run]), 1e-9)


def test_flow_euler_and_heun_match_diffusers():
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
        got = run(
            lambda x, t, d=denoiser: d(x, t, Condition()),
            flow,
            X,
            scheduler.sigmas.double().unique(sorted=True).flip(0),
            None,
        )
        close(got, x)
