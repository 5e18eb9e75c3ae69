import math
from types import SimpleNamespace

import pytest
import torch
from cases import F64, f64
from diffusers import DDIMScheduler

from ldm.diffusion import grids, schedule, times
from ldm.tensors import KeyedNoise

TABLE = schedule.linear()
DTYPES = {torch.bfloat16: torch.float32, torch.float32: torch.float32, F64: F64}  # of the data, and of their times
U = (torch.arange(100_000) + 0.5) / 100_000  # every quantile


def test_discrete_times_are_uniform_over_entries():
    t = times.discrete(U, TABLE)
    assert torch.equal(TABLE.net_time(t).unique(return_counts=True)[1], torch.full((1000,), 100))
    edge = times.discrete(torch.tensor([0.0, 1 - 2**-24]), TABLE)
    assert TABLE.net_time(edge).tolist() == [0, 999]
    assert times.discrete(torch.tensor([1 - 2**-24]), schedule.cosine(4000)).tolist() == [1]


def test_uniform_times_exclude_0():
    assert times.uniform(torch.tensor([0.0, 0.25, 1 - 2**-24]), TABLE).tolist() == [1, 0.75, 2**-24]


@pytest.mark.parametrize("sched", [schedule.EDM(), schedule.EDM(2.0), schedule.cosine()])
def test_log_normal_times_are_truncated_to_schedule(sched):
    t = times.log_normal(U.double(), sched, mean=-1.2, std=1.2)
    assert (t > 0).all()
    assert (t <= 1).all()
    assert (t.diff() >= 0).all()
    log_sigma = -sched.log_snr(t) / 2
    top = float(-sched.log_snr(f64(1.0)) / 2)
    inside = torch.distributions.Normal(-1.2, 1.2)
    for q in (0.1, 0.5, 0.9):
        value = float(log_sigma.quantile(q))
        want = inside.icdf(f64(q) * inside.cdf(f64(top)))
        assert value == pytest.approx(float(want), abs=1e-3)
    extreme = times.log_normal(torch.tensor([0.0, 1 - 2**-24]), sched)
    assert (extreme > 0).all()
    assert (extreme <= 1).all()


def test_logit_normal_times_match_distribution():
    t = times.logit_normal(U.double(), TABLE, mean=0.3, std=0.8)
    logit = t.logit()
    assert (t.diff() > 0).all()
    assert logit.mean() == pytest.approx(0.3, abs=1e-3)
    assert logit.std() == pytest.approx(0.8, abs=1e-3)
    shifted = times.logit_normal(U.double(), TABLE, mean=0.3, std=0.8, shift=3.0)
    assert torch.allclose(
        shifted.logit() - logit, torch.full_like(logit, math.log(3))
    )  # sigma / alpha times 3 on a flow
    edge = times.logit_normal(torch.tensor([0.0, 1 - 2**-24]), TABLE)
    assert (edge > 0).all()
    assert (edge < 1).all()


def test_independent_times_are_independent_of_batch():
    x0 = torch.zeros(6, 2)
    whole = times.independent(KeyedNoise(3, range(6)), x0, TABLE, times.discrete)
    parts = [times.independent(KeyedNoise(3, r), x0[:3], TABLE, times.discrete) for r in (range(3), range(3, 6))]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.dtype == torch.float32
    assert len(whole.unique()) > 3


@pytest.mark.parametrize("draw", [times.independent, times.stratified])
def test_times_are_as_precise_as_data(draw):
    """At least float32; in float64 they are those of float32 without its rounding, not others."""
    t = {dtype: draw(KeyedNoise(3, range(6)), torch.zeros(6, 2, dtype=dtype), TABLE, times.uniform) for dtype in DTYPES}
    assert {dtype: value.dtype for dtype, value in t.items()} == DTYPES
    assert torch.equal(t[torch.bfloat16], t[torch.float32])
    assert (t[F64] - t[torch.float32]).abs().max() <= 2**-23


def test_stratified_times_have_one_sample_per_stratum_over_ranks():
    def rank(rows):
        return times.stratified(
            KeyedNoise(0, rows, position=rows, global_batch_size=8), torch.zeros(4, 3), TABLE, times.uniform
        )

    t = torch.cat([rank([0, 2, 4, 6]), rank([1, 3, 5, 7])])
    assert (8 * (1 - t)).floor().sort().values.tolist() == list(range(8))
    alone = times.stratified(KeyedNoise(0, range(8)), torch.zeros(8, 3), TABLE, times.uniform)
    assert torch.equal(alone.sort().values, t.sort().values)
    assert len((alone * 8).frac().unique()) == 8


def test_stratified_times_exclude_0():
    """(7 + u) / 8 with the largest u below 1 rounds to 1."""
    highest = SimpleNamespace(
        uniform=lambda purpose, x: torch.full_like(x, 1 - 2**-24), position=[7], global_batch_size=8
    )
    assert times.stratified(highest, torch.zeros(1, 3), TABLE, times.uniform) == 2**-24


@pytest.mark.parametrize(
    ("n", "spacing", "offset"),
    [
        *((n, spacing, 0) for n in (1, 7, 10, 50, 1000) for spacing in ("leading", "trailing", "linspace")),
        *((n, "leading", 1) for n in (1, 7, 10, 50)),
    ],
)
def test_grids_match_diffusers_indices(n, spacing, offset):
    theirs = DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(n)
    grid = grids.leading(TABLE, n, offset) if spacing == "leading" else getattr(grids, spacing)(TABLE, n)
    if spacing == "linspace" and n == 1:
        theirs.timesteps = torch.tensor([999])  # theirs starts a single step at 0
    assert TABLE.net_time(grid[:-1]).tolist() == theirs.timesteps.tolist()
    assert grid[-1] == 0
    assert grid.dtype == F64


def test_grids_have_exact_indices():
    """FIELD: off by one, last step not 0. These are i, with -1 for data."""

    def index(ts):
        return (ts * 1000 - 1).round().int().tolist()

    assert index(grids.leading(TABLE, 4)) == [750, 500, 250, 0, -1]
    assert index(grids.leading(TABLE, 4, offset=1)) == [751, 501, 251, 1, -1]
    assert index(grids.trailing(TABLE, 4)) == [999, 749, 499, 249, -1]
    assert index(grids.linspace(TABLE, 4)) == [999, 666, 333, 0, -1]
    assert index(grids.replace_end(grids.trailing(TABLE, 4), 1 / 1000)) == [999, 749, 499, 249, 0]


def test_uniform_grid_is_even():
    assert grids.uniform_grid(schedule.Flow(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_log_snr_grid_is_even():
    for sched in (schedule.VP(), TABLE):
        ts = grids.log_snr(sched, 9, end=0.01)
        gaps = sched.log_snr(ts[:-1]).diff()
        assert torch.allclose(gaps, gaps[:1].expand(8))
        assert gaps[0] > 0
        assert ts[0] == pytest.approx(1)
        assert ts[-2] == pytest.approx(0.01)
        assert ts[-1] == 0
        assert len(ts) == 10
    with pytest.raises(ValueError, match=r"set start=0.999"):
        grids.log_snr(schedule.Flow(), 9)
    assert grids.log_snr(schedule.Flow(), 9, start=0.999)[0] == pytest.approx(0.999)


def test_karras_grid_matches_equation_5():
    ts = grids.karras(schedule.EDM(), 5)
    i = torch.arange(5, dtype=F64)
    want = (80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert torch.allclose(80 * ts[:-1], want, rtol=1e-9)
    assert ts[-1] == 0
    assert ts[0] == 1
    ts = grids.karras(TABLE, 5, sigma_min=0.1, sigma_max=10.0)
    assert (-TABLE.log_snr(ts[:-1]) / 2).exp()[[0, -1]].tolist() == pytest.approx([10, 0.1])
    with pytest.raises(ValueError, match="beyond this schedule, whose sigma / alpha ends at 157"):
        grids.karras(TABLE, 5, sigma_max=200.0)


def test_start_at_begins_at_strength():
    ts = grids.uniform_grid(schedule.Flow(), 10)
    assert grids.start_at(ts, 0.35).tolist() == pytest.approx([0.35, 0.3, 0.2, 0.1, 0])
    assert torch.allclose(grids.start_at(ts, float(ts[4])), ts[4:])
    assert torch.equal(grids.start_at(ts, 1.0), ts)
    for bad in (0.0, 1.2):
        with pytest.raises(ValueError, match=f"strength {bad}"):
            grids.start_at(ts, bad)


def test_default_grid_follows_entries_where_there_are_any():
    assert torch.equal(grids.default_grid(TABLE, 7), grids.trailing(TABLE, 7))
    assert torch.equal(grids.default_grid(schedule.Flow(), 7), grids.uniform_grid(schedule.Flow(), 7))


def test_grids_reject_invalid_arguments():
    with pytest.raises(ValueError, match="Flow is continuous, it has no entries"):
        grids.trailing(schedule.Flow(), 4)
    for n in (0, 1001):
        with pytest.raises(ValueError, match=f"{n} steps on a schedule of 1000 entries; choose 1 to 1000"):
            grids.leading(TABLE, n)
