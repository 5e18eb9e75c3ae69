"""Times and noise by level: within their strata, spread evenly, and the same whatever the batch."""

from functools import partial

import pytest
import torch
from torch import nn

from ldm.diffusion import schedule, times
from ldm.diffusion.fixed_pairs import (
    GOLDEN,
    fixed_quantiles,
    level_noise,
    on_grid,
    per_row_objective,
    timestep_density,
)
from ldm.diffusion.objective import LogVariance, LossSecondMoment, Objective, VLBObjective
from ldm.diffusion.prior_preservation import PriorPreservation
from ldm.diffusion.weighting import output
from ldm.tensors import KeyedNoise, derive_seed

COSINE = schedule.cosine()


def test_fixed_quantiles_match_closed_form():
    assert fixed_quantiles([0, 1, 2, 5], 0, 1).tolist() == pytest.approx(
        [0.5, (0.5 + GOLDEN) % 1, (0.5 + 2 * GOLDEN) % 1, (0.5 + 5 * GOLDEN) % 1], abs=1e-15
    )
    assert abs(GOLDEN**2 + GOLDEN - 1) < 1e-15
    assert fixed_quantiles([3], 2, 8).dtype == torch.float64


@pytest.mark.parametrize("levels", [1, 3, 8])
def test_fixed_quantiles_are_in_their_stratum(levels):
    for level in range(levels):
        u = fixed_quantiles(range(10_000), level, levels)
        assert level / levels <= float(u.min())
        assert float(u.float().max()) < (level + 1) / levels or level + 1 < levels
        assert float(u.max()) < (level + 1) / levels
        assert torch.allclose(u, fixed_quantiles(range(10_000), 0, levels) + level / levels, atol=1e-7)
    assert 0.9999999 < float(fixed_quantiles([7465176], levels - 1, levels).float()) < 1  # which rounds to 1 in float32


@pytest.mark.parametrize("num", [5, 64, 1000])
def test_fixed_quantiles_have_at_most_three_gaps(num):
    """The gaps of multiples of the golden ratio have three lengths at most, in its ratios (Sos 1958)."""
    u = fixed_quantiles(range(num), 0, 1).sort().values
    gaps = torch.cat([u.diff(), u[:1] + 1 - u[-1:]])
    assert len({round(float(gap), 9) for gap in gaps}) <= 3
    assert float(gaps.max() / gaps.min()) < GOLDEN**-2 + 1e-6


@pytest.mark.parametrize("draw", [times.independent, times.stratified])
@pytest.mark.parametrize("density", [times.discrete, times.uniform, times.log_normal, times.logit_normal])
def test_level_noise_fixes_t_of_every_sampling(draw, density):
    """One and the same t, whichever rows are beside it, with a stratified draw too."""
    rows, numbers, x0 = [7, 2, 40, 11], [1, 0, 3, 2], torch.zeros(4, 1, 2, 2)
    t = draw(level_noise(0, rows, numbers, 3, 8), x0, COSINE, density)
    u = fixed_quantiles(numbers, 3, 8).float()
    assert torch.equal(t, density(u, COSINE))
    for i, row in enumerate(rows):
        assert torch.equal(draw(level_noise(5, [row], numbers[i : i + 1], 3, 8), x0[:1], COSINE, density), t[i : i + 1])


def test_level_noise_is_keyed_by_seed_level_and_row():
    x = torch.zeros(2, 3, 4)
    eps = level_noise(1, [4, 9], [0, 1], 2, 8).normal("eps", x)
    generator = torch.Generator().manual_seed(derive_seed(derive_seed(1, "validation", 2), "eps", 9))
    assert torch.equal(eps[1], torch.randn(3, 4, generator=generator))
    assert torch.equal(level_noise(1, [9], [3], 2, 8).normal("eps", x[:1]), eps[1:])
    assert torch.equal(level_noise(1, [4, 9], [0, 1], 2, 5).normal("eps", x), eps)
    others = [level_noise(1, [4, 9], [0, 1], 3, 8), level_noise(2, [4, 9], [0, 1], 2, 8), KeyedNoise(1, [4, 9])]
    assert not any(torch.equal(other.normal("eps", x), eps) for other in others)
    assert (others[0].position, others[0].global_batch_size) == ([0, 0], 1)
    scale = level_noise(1, [4, 9], [0, 1], 2, 8).uniform("scale", torch.zeros(2))
    assert torch.equal(scale, KeyedNoise(derive_seed(1, "validation", 2), [4, 9]).uniform("scale", torch.zeros(2)))


def objective(density=times.discrete):
    return Objective(partial(times.stratified, density=density), output)


def test_timestep_density_replaces_times_of_inner_objectives_within_block():
    inner = objective()
    outer = LogVariance(inner)
    before, noise, x0 = inner.times, level_noise(0, range(6), range(6), 1, 4), torch.zeros(6, 1)
    with timestep_density(outer, times.uniform):
        t = inner.times(noise, x0, schedule.Flow())
        assert torch.equal(t, 1 - fixed_quantiles(range(6), 1, 4).float())
        assert torch.equal(outer.draw(noise, x0, schedule.Flow())[0], t)
    assert inner.times is before
    with timestep_density(outer, None):
        assert inner.times is before


def test_timestep_density_is_rounded_to_grid_of_schedule():
    u = torch.tensor([0.0, 0.4, 0.5003, 1 - 2**-24])
    t = on_grid(times.uniform, u, COSINE)
    assert torch.allclose(t, torch.tensor([1.0, 0.6, 0.5, 0.001]), atol=1e-7)
    assert torch.equal(on_grid(times.uniform, u, schedule.Flow()), 1 - u)


def test_per_row_objective_removes_wrappers_that_weight_rows():
    plain = objective()
    assert per_row_objective(plain) is plain
    assert per_row_objective(PriorPreservation(plain, 0)) is plain
    bound = VLBObjective(partial(times.independent, density=times.discrete))
    assert per_row_objective(PriorPreservation(LossSecondMoment(bound), 0)) is bound
    balanced = LogVariance(plain)
    assert per_row_objective(balanced) is balanced
    assert isinstance(balanced, nn.Module)
