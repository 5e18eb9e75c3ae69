import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.metrics.neighbours import DensityCoverage, Memorisation, density_coverage, memorisation


def features(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))


def distances(a: Tensor, b: Tensor) -> np.ndarray:
    return np.linalg.norm(a.double().numpy()[:, None] - b.double().numpy()[None], axis=2)


@pytest.mark.parametrize("k", [1, 5])
def test_density_coverage_match_double_sum(k):
    x, y = features(70, 1) * 0.7 + 0.2, features(90, 2)
    radius = np.sort(distances(y, y), axis=1)[:, k]
    inside = distances(x, y) <= radius
    density, coverage = density_coverage(x, y, k)
    assert density.item() == pytest.approx(inside.sum() / (k * 70), rel=1e-12)
    assert coverage.item() == pytest.approx(inside.any(0).mean(), rel=1e-12)


def test_density_of_same_distribution_is_one():
    density, coverage = density_coverage(features(800, 1), features(800, 2), 5)
    assert density.item() == pytest.approx(1, abs=0.1)
    assert coverage.item() == pytest.approx(1 - 2**-5, abs=0.03)  # Naeem et al. 2020, eq. 9: N = M
    piled = density_coverage(features(800, 1) * 0.05, features(800, 2), 5)
    assert piled[1] < 0.2


def test_memorisation_matches_manual_value():
    training, x = features(200, 1), features(150, 2)
    own = distances(training, training)
    np.fill_diagonal(own, np.inf)
    to = distances(x, training)
    nearest = to.argmin(1)
    authenticity, copies = memorisation(x, training)
    assert authenticity.item() == pytest.approx((to.min(1) > own.min(1)[nearest]).mean(), abs=1e-12)
    assert copies.item() == pytest.approx((to.min(1) <= np.sort(own.min(1))[2]).mean(), abs=1e-12)
    assert 0.3 < authenticity < 0.7  # of the same distribution: as far as those are from each other
    copied = memorisation(training[:50] + 1e-4, training)
    assert copied[0] <= 0.02
    assert copied[1] >= 0.98
    assert memorisation(x + 100, training) == (1, 0)


@pytest.mark.parametrize(
    ("found", "said"), [(density_coverage, "more than k=5"), (memorisation, "needs at least one and two")]
)
def test_neighbour_metrics_reject_too_few_samples(found, said):
    for x, y in ((features(0, 1), features(9, 2)), (features(9, 1), features(1, 2))):
        with pytest.raises(ValueError, match=said):
            found(x, y)


@pytest.mark.parametrize("make", [DensityCoverage, Memorisation])
def test_neighbour_metrics_are_independent_of_batches_and_reset(make):
    x, metric = features(60, 1), make(None, features(80, 2))
    metric.update(x)
    whole = metric.compute()
    metric.reset()
    for part in x.split(7):
        metric.update(part)
    assert metric.compute() == whole
    assert len(whole) == 2
