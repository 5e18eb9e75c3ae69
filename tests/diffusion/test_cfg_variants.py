"""Corrections of classifier-free guidance: equal to it where their papers say so, and to diffusers' guiders."""

import pytest
import torch
from cases import F64, f64
from test_guidance import COND, UNCOND, Net

from ldm.diffusion import cfg_variants, guidance, prediction, sampler, schedule
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import ConfigError

SHAPE = (3, 4, 16, 16)
T = f64(0.6)[0]
NO_LIMIT = {"adaptive_projected_guidance_rescale": 0.0}
PLAIN = {  # options with which each is guidance.cfg
    "apg": {"eta": 1.0},
    "cfg_zero_star": None,
    "fdg": {"low_scale": 2.5},
    "magnitude_aware": {"alpha": 0.0},
    "tcfg": None,
}


def make(net=Net, process=None, output=None):
    return Denoiser(net(), process or schedule.cosine(), output or prediction.V())


def flow():
    return make(process=schedule.Flow(), output=prediction.Flow())


def states(seed=0, shape=SHAPE):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def parts(denoiser, x, quantity=None):
    """The conditional and the unconditional prediction, in a quantity or as x0."""
    alpha, sigma = denoiser.schedule.alpha_sigma(T)
    a, b = (quantity or prediction.X0()).coefficients(alpha, sigma)
    return tuple(a * part.x0 + b * part.eps for part in (denoiser(x, T, COND), denoiser(x, T, UNCOND)))


def guided(name, denoiser, x, quantity=None, **options):
    """The guided prediction in a quantity, after the test that x0 and eps are those of one x_t."""
    got = getattr(cfg_variants, name)(denoiser, COND, UNCOND, **options)(x, T)
    alpha, sigma = denoiser.schedule.alpha_sigma(T)
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x)
    a, b = (quantity or prediction.X0()).coefficients(alpha, sigma)
    return a * got.x0 + b * got.eps


@pytest.mark.parametrize("name", [name for name, options in PLAIN.items() if options is not None])
@pytest.mark.parametrize("options", [{}, {"rescale": 0.7}, {"interval": (0.0, 0.5)}], ids=str)
def test_variant_is_cfg_bit_for_bit_where_its_paper_says_so(name, options):
    d, x = make(), states()
    got = getattr(cfg_variants, name)(d, COND, UNCOND, scale=2.5, **PLAIN[name], **options)(x, T)
    plain = guidance.cfg(d, COND, UNCOND, scale=2.5, **options)(x, T)
    assert torch.equal(got.x0, plain.x0)
    assert torch.equal(got.eps, plain.eps)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_variant_at_scale_1_evaluates_the_condition_alone(name):
    d, x = flow(), states()
    getattr(cfg_variants, name)(d, COND, None)(x, T)
    assert (d.net.calls, d.net.rows) == (1, 3)


def test_apg_keeps_the_orthogonal_part_and_eta_of_the_parallel_one():
    d, x = make(), states()
    c, u = parts(d, x)
    got = guided("apg", d, x, scale=4.0, eta=0.25) - c
    one = c / c.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
    along = ((c - u) * one).sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close((got * one).sum((1, 2, 3), keepdim=True), 3 * 0.25 * along)
    torch.testing.assert_close(got, 3 * (c - u - 0.75 * along * one))


def test_apg_limits_the_norm_and_sums_the_differences():
    d, x = make(), states()
    denoise = cfg_variants.apg(d, COND, UNCOND, scale=3.0, eta=1.0, norm_threshold=2.0, momentum=-0.5)
    denoise(x, T)
    got = denoise(states(1), T).x0
    (c, u), (c2, u2) = parts(d, x), parts(d, states(1))
    update = (c2 - u2) - 0.5 * (c - u)
    lengths = update.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
    assert (lengths > 2).all()
    torch.testing.assert_close(got, c2 + 2 * update * 2 / lengths)


def test_cfg_zero_star_scales_the_unconditional_velocity_to_fit():
    d, x = flow(), states()
    c, u = parts(d, x, prediction.Flow())
    fit = torch.stack([(a.flatten() @ b.flatten()) / b.pow(2).sum() for a, b in zip(c, u, strict=True)])
    u = fit.view(-1, 1, 1, 1) * u
    torch.testing.assert_close(guided("cfg_zero_star", d, x, prediction.Flow(), scale=2.5), u + 2.5 * (c - u))
    torch.testing.assert_close(((c - u) * u).sum((1, 2, 3)), torch.zeros(3, dtype=F64), atol=1e-10, rtol=0)


def test_cfg_zero_star_begins_with_velocity_zero():
    d, x = flow(), states()
    got = cfg_variants.cfg_zero_star(d, COND, UNCOND, scale=2.0, zero_init=0.04)(x, f64(0.98)[0])
    assert d.net.calls == 0
    assert torch.equal(got.x0, x)
    assert torch.equal(got.eps, x)
    moved = sampler.ddim(
        cfg_variants.cfg_zero_star(d, COND, UNCOND, scale=2.0, zero_init=0.04), d.schedule, x, f64(0.98, 0.97), None
    )
    torch.testing.assert_close(moved, x)


def test_zero_velocity_of_another_schedule_is_refused():
    with pytest.raises(ConfigError, match=r"guidance\.zero_init=0\.04: .* set guidance\.zero_init=0, or"):
        cfg_variants.cfg_zero_star(make(), COND, UNCOND, scale=2.0)
    with pytest.raises(ConfigError, match=r"guidance\.zero_init=1: expected"):
        cfg_variants.cfg_zero_star(flow(), COND, UNCOND, scale=2.0, zero_init=1)


def test_magnitude_aware_weakens_a_large_difference():
    d, x = make(), states()
    c, u = parts(d, x, prediction.V())
    ratio = ((c - u).pow(2).sum((1, 2, 3)) / u.pow(2).sum((1, 2, 3))).sqrt().view(-1, 1, 1, 1)
    want = u + (1 + 1.5 * torch.exp(-0.3 * ratio)) * (c - u)
    torch.testing.assert_close(guided("magnitude_aware", d, x, prediction.V(), scale=2.5, alpha=0.3), want)


def test_tcfg_keeps_the_first_singular_direction():
    d, x = make(), states()
    c, u = parts(d, x, prediction.V())
    rows = []
    for a, b in zip(c, u, strict=True):
        direction = torch.linalg.svd(torch.stack([a.flatten(), b.flatten()]), full_matrices=False)[2][0]
        kept = (b.flatten() @ direction * direction).view(b.shape)
        rows.append(kept + 2.5 * (a - kept))
    torch.testing.assert_close(guided("tcfg", d, x, prediction.V(), scale=2.5), torch.stack(rows))


def test_fdg_scales_a_constant_by_low_and_a_checkerboard_by_high():
    d, x = make(), states()
    flat = torch.ones(1, 1, 16, 16, dtype=F64)
    checks = flat * (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))
    torch.testing.assert_close(cfg_variants.low_frequencies(flat), flat)
    assert cfg_variants.low_frequencies(checks).abs().max() < 1e-12
    c, u = parts(d, x)
    low = cfg_variants.low_frequencies(c - u)
    torch.testing.assert_close(guided("fdg", d, x, scale=4.0, low_scale=1.5), u + 4 * (c - u - low) + 1.5 * low)


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 8, 10), (2, 3, 4, 6, 8)])
def test_low_frequencies_of_one_two_and_three_dimensions(shape):
    x = states(shape=shape)
    low = cfg_variants.low_frequencies(x)
    assert low.shape == x.shape
    assert 0 < low.var() < x.var() / 2
    torch.testing.assert_close(cfg_variants.low_frequencies(x.flip(-1)), low.flip(-1))
    with pytest.raises(ConfigError, match="expected sides from 3"):
        cfg_variants.low_frequencies(x[..., :2])


@pytest.mark.parametrize(
    ("name", "options", "quantity", "guider", "settings"),
    [
        ("apg", {"eta": 0.3}, prediction.X0(), "AdaptiveProjectedGuidance", {"eta": 0.3, **NO_LIMIT}),
        (
            "apg",
            {"eta": 0.3, "norm_threshold": 5.0, "momentum": -0.5},
            prediction.X0(),
            "AdaptiveProjectedGuidance",
            {"eta": 0.3, "adaptive_projected_guidance_rescale": 5.0, "adaptive_projected_guidance_momentum": -0.5},
        ),
        ("cfg_zero_star", {}, prediction.Flow(), "ClassifierFreeZeroStarGuidance", {"zero_init_steps": 0}),
        ("magnitude_aware", {"alpha": 0.5}, prediction.Flow(), "MagnitudeAwareGuidance", {"alpha": 0.5}),
        ("tcfg", {}, prediction.Flow(), "TangentialClassifierFreeGuidance", {}),
        ("fdg", {"low_scale": 1.5}, prediction.X0(), "FrequencyDecoupledGuidance", {"guidance_scales": [3.0, 1.5]}),
    ],
)
def test_variant_equals_guider_of_diffusers(name, options, quantity, guider, settings):
    from diffusers import guiders

    d, x = flow(), states()
    c, u = parts(d, x, quantity)
    # of diffusers' two forms the "original" one is APG's paper's: conditional + scale (...), a scale less by one
    original = name == "apg"
    settings = settings if name == "fdg" else {"guidance_scale": 2.0 if original else 3.0, **settings}
    theirs = getattr(guiders, guider)(use_original_formulation=original, **settings)
    theirs.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(600))
    if "momentum" in options:
        theirs.momentum_buffer = guiders.adaptive_projected_guidance.MomentumBuffer(-0.5)
    zero = {"zero_init": 0.0} if name == "cfg_zero_star" else {}
    got = guided(name, d, x, quantity, scale=3.0, **options, **zero)
    if name == "magnitude_aware":  # as (B, N, C): for images that of diffusers 0.42.1 raises RuntimeError in torch 2.14
        want = theirs.forward(c.flatten(2), u.flatten(2)).pred.view(c.shape)
    else:
        want = theirs.forward(c, u).pred
    assert want.dtype == F64
    limit = 1e-6 if name in ("tcfg", "cfg_zero_star") else 1e-12  # these two compute in float32 there
    assert (got - want).abs().max() < limit * want.abs().max()
