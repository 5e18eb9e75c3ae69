import pytest
import torch

from ldm.metrics.interval import bootstrap, paired, t_quantile, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (1, 100, 0.0018, 0.0545)],
)
def test_wilson_matches_table(hits, total, low, high):
    assert wilson(hits, total) == pytest.approx((low, high), abs=2e-4)


def test_bootstrap_of_large_sample_is_normal_interval():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0)) + 3
    low, high = bootstrap(values)
    reach = 1.96 * values.std().item() / 2000**0.5
    assert (low, high) == pytest.approx((values.mean().item() - reach, values.mean().item() + reach), abs=0.1 * reach)
    assert bootstrap(torch.ones(5)) == (1.0, 1.0)


def test_intervals_reject_invalid_input():
    with pytest.raises(ValueError, match="3 hits of 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="expected one number for each of at least one"):
        bootstrap(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)]
)
def test_t_quantile_matches_table(freedom, t):
    assert t_quantile(0.95, freedom) == pytest.approx(t, abs=1e-4)


def test_paired_interval_matches_manual_value():
    low, high = paired([1.0, 2.0, 3.0])  # mean 2, deviation 1, 4.3027 / sqrt(3) to either side
    assert (low, high) == pytest.approx((2 - 2.4842, 2 + 2.4842), abs=1e-3)
    low, high = paired([10.0, 20.0, 30.0])  # the reach is in the unit of the differences
    assert (low, high) == pytest.approx((20 - 24.842, 20 + 24.842), abs=1e-2)
    with pytest.raises(ValueError, match="1 difference: expected two or more"):
        paired([1.0])
