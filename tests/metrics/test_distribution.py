import os
import warnings
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from ldm.io.images import to_uint8
from ldm.metrics import distribution
from ldm.metrics.distribution import (
    ClassAccuracy,
    FrechetDistance,
    GaussianDistance,
    KernelDistance,
    MetricSuite,
    PrecisionRecall,
    frechet,
    polynomial_mmd,
    precision_recall,
    squared_distances,
    subsample,
)
from ldm.metrics.foundation import CLIPScore
from ldm.metrics.inception import InceptionScore, SlicedMetric
from ldm.metrics.neighbours import DensityCoverage, Memorisation
from ldm.metrics.paired import Reconstruction

D = 6


class Toy(nn.Module):
    """Features of (B, 1, 2, 3) pictures: their pixels, centred and scaled; the brightest of the first three is the
    class.
    """

    name, num_features, identity, resize = "toy", D, "0", "none"

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        self.calls += 1
        return (images.flatten(1).float() - 128) / 64

    def classify(self, features: Tensor) -> Tensor:
        return features[:, :3]

    def embed(self, captions: list[str]) -> Tensor:
        return torch.tensor([[len(one) / 10] * D for one in captions])


def features(n: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(0))
    return torch.randn(n, D, generator=generator) @ mix + shift


def pictures(n: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 1, 2, 3, generator=generator) * 0.3 + shift).clamp(-1, 1)


def moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return x.double().numpy().mean(0), np.cov(x.double().numpy(), rowvar=False)


def score(reference: Tensor, **metrics) -> MetricSuite:
    return MetricSuite(Toy(), reference, metrics or {"fd": FrechetDistance})


def to_features(image: Tensor) -> Tensor:
    return Toy()(to_uint8(image))


def fd(reference: Tensor, x: Tensor) -> float:
    net = Toy()
    net.num_features = reference.shape[1]
    metric = FrechetDistance(net, reference)
    for batch in x.split(37):
        metric.update(batch)
    return metric.compute()["fd_toy"]


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_frechet_distance_matches_scipy_and_torch_fidelity(offset):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    a, b = features(400, 1) + offset, features(300, 2, 0.5) * 1.3 + offset
    (m1, s1), (m2, s2) = moments(a), moments(b)
    root = scipy.linalg.sqrtm(s1 @ s2)
    expected = ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(b.double()), fid_features_to_statistics(a.double()), False
    )
    ours = frechet(*map(torch.as_tensor, (m1, s1, m2, s2))).item()
    assert fd(a, b) == pytest.approx(expected, rel=1e-6)
    assert fd(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_matches_closed_form():
    s1, s2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 0.0, 1.0])  # commuting, one singular
    expected = 3 * 0.25 + (s1.sqrt() - s2.sqrt()).square().sum().item()
    for a, b in ((s1, s2), (s2, s1)):  # the root is taken of the singular one too
        assert frechet(torch.zeros(3), a.diag(), torch.full((3,), 0.5), b.diag()).item() == pytest.approx(
            expected, rel=1e-12
        )


def test_distribution_metrics_of_identical_sets_ignore_order():
    x = features(200, 1)
    mixed = x[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert fd(x, mixed) == pytest.approx(0, abs=1e-9)
    assert [p.item() for p in precision_recall(mixed, x)] == [1, 1]
    y = features(150, 2, 0.3)
    shuffled = y[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    assert polynomial_mmd(y, x).item() == pytest.approx(polynomial_mmd(shuffled, x).item(), rel=1e-10)


def test_kernel_distance_matches_double_sum_and_is_unbiased(monkeypatch):
    x, y = features(30, 1), features(21, 2, 0.4)
    kernel = lambda a, b: (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / D + 1) ** 3  # noqa: E731

    def pairs(z):
        return sum(kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) / (len(z) * (len(z) - 1))

    expected = pairs(x) + pairs(y) - 2 * sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    assert polynomial_mmd(x, y).item() == pytest.approx(expected, rel=1e-9)
    null = torch.stack([polynomial_mmd(features(40, 2 * i), features(40, 2 * i + 1)) for i in range(1, 200)])
    assert null.mean().abs() < 3 * null.std() / len(null) ** 0.5  # the diagonal, left in, would be some 20 of these off


def test_kernel_distance_matches_torchmetrics():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = features(50, 1), features(50, 2, 0.4)
    theirs = KernelInceptionDistance(nn.Identity(), subsets=1, subset_size=50)
    theirs.update(y.double(), real=True)
    theirs.update(x.double(), real=False)
    assert polynomial_mmd(x, y).item() == pytest.approx(theirs.compute()[0].item(), rel=1e-5)


def brute_force(x: Tensor, reference: Tensor, k: int) -> tuple[float, float]:
    """Kynkaanniemi et al. 2019, appendix A, with loops and numpy."""

    def manifold(points):
        return [(p, sorted(np.linalg.norm(points - p, axis=1))[k]) for p in points]

    def share(points, balls):
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in balls) for p in points])

    x, reference = x.double().numpy(), reference.double().numpy()
    return share(x, manifold(reference)), share(reference, manifold(x))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_matches_brute_force(k, monkeypatch):
    x, reference = features(60, 1) * 0.5, features(80, 2)
    x[7] = x[8] = reference[3]  # a ball of radius 0 at k = 1
    expected = brute_force(x, reference, k)
    assert expected[0] > expected[1] + 0.1
    assert [p.item() for p in precision_recall(x, reference, k)] == pytest.approx(expected, abs=1e-12)
    one_by_one = Tensor.split
    monkeypatch.setattr(Tensor, "split", lambda self, size: one_by_one(self, 7))
    assert [p.item() for p in precision_recall(x, reference, k)] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_squared_distances_are_zero_between_equal_rows_only(scale):
    """At any scale: a product of 16 terms has a rounding error below 4e-15 of the norms."""
    x = scale * torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).double()
    found = torch.cat(list(squared_distances(x, x)))
    expected = (x[:, None] - x[None]).square().sum(2)
    assert not found.diagonal().any()
    assert torch.count_nonzero(found) == 300 * 299
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_precision_recall_separate_narrow_from_wide():
    reference = features(300, 1)
    narrow, wide = (precision_recall(features(300, 2) * s, reference) for s in (0.2, 3.0))
    assert narrow[0] > 0.95 > 0.5 > narrow[1]
    assert wide[1] > 0.95 > 0.5 > wide[0]
    with pytest.raises(ValueError, match="more than k=3"):
        precision_recall(reference[:3], reference)


EVERYTHING = {
    "fd": FrechetDistance,
    "kid": partial(KernelDistance, reference_size=90),
    "pr": partial(PrecisionRecall, reference_size=90),
}
EVERYTHING |= {"accuracy": ClassAccuracy, "clip_score": CLIPScore, "cmmd": GaussianDistance, "memory": Memorisation}
EVERYTHING |= {"density": DensityCoverage, "is": partial(InceptionScore, block=20)}
EVERYTHING["part"] = partial(SlicedMetric, metric=FrechetDistance, name="half", start=2, stop=5)
KEYS = {"n", "fd_toy", "kid_toy", "precision", "recall", "accuracy", "clip_score", "cmmd_toy", "authenticity", "copies"}
KEYS |= {"density", "coverage", "inception_score", "fd_half"}
CAPTIONS = ["a" * (i % 7) for i in range(90)]


def test_distribution_score_is_independent_of_batches_and_resets():
    reference, image = Toy()((pictures(100, 1).add(1) * 127.5).round().byte()), pictures(64, 2, 0.1)
    label = torch.arange(64) % 3
    metrics = score(reference, **EVERYTHING)

    def run(size):
        metrics.reset()
        for start in range(0, 64, size):
            rows = slice(start, start + size)
            metrics.update(image[rows], label[rows], CAPTIONS[:64][rows])
        with pytest.warns(UserWarning, match="64 samples with 6 features: distances are biased"):
            return metrics.compute()

    first = run(64)
    assert metrics.net.calls == 1
    assert first.keys() == KEYS
    assert first["n"] == 64
    seen = (image.flatten(1)[:, :3].argmax(1) == label).double().mean().item()
    assert first["accuracy"] == pytest.approx(seen, abs=1e-6)
    assert first["fd_half"] == pytest.approx(fd(reference[:, 2:5], to_features(image)[:, 2:5]), rel=1e-6)
    again = run(10)
    assert metrics.net.calls == 1 + 7
    assert again == pytest.approx(first, rel=1e-6)
    with pytest.warns(UserWarning, match="biased"):
        assert metrics.compute() == again  # asking twice changes nothing
    assert metrics.provenance.items() >= {"network": "toy", "identity": "0", "resize": "none", "reference": 100}.items()


class Blank:
    """1,500 features of any image, all zero."""

    name, num_features, identity = "blank", 1500, "0"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), 1500)


def test_distribution_score_warns_below_twice_the_features(monkeypatch):
    metrics = MetricSuite(Blank(), torch.zeros(2, 1500), {})
    for _ in range(3):
        metrics.update(torch.zeros(900, 1, 1, 1))
    with pytest.warns(UserWarning, match="2700 samples with 1500 features: .* below 3000"):
        metrics.compute()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with monkeypatch.context() as patch:
            patch.setattr(distribution, "rank", lambda: 1)  # one process warns
            metrics.compute()
        metrics.update(torch.zeros(300, 1, 1, 1))
        assert metrics.compute() == {"n": 3000}


def test_distribution_score_rejects_invalid_reference():
    reference = features(50, 1)
    for bad in (reference[:1], reference[:, :3], reference[0]):
        with pytest.raises(ValueError, match="expected at least 2 rows of 6"):
            score(bad)
    with pytest.raises(ValueError, match="reference: 1 of 50 rows"):
        score(reference.index_fill(0, torch.tensor([3]), float("inf")))
    with pytest.raises(ValueError, match="0 samples"):
        score(reference).compute()
    metrics = score(reference, accuracy=ClassAccuracy)
    with pytest.raises(ValueError, match="NaN"):
        metrics.update(pictures(4, 1) * float("nan"), torch.zeros(4))
    with pytest.raises(ValueError, match="label"):
        metrics.update(pictures(4, 1))


def test_distribution_score_rejects_nan_features(monkeypatch):
    metrics = score(features(50, 1))
    monkeypatch.setattr(Toy, "forward", lambda self, images: torch.full((len(images), D), float("nan")))
    with pytest.raises(ValueError, match="features: 4 of 4 rows are not finite"):
        metrics.update(pictures(4, 1))


def test_subsample_takes_evenly_spaced_rows():
    x = torch.arange(10)[:, None]
    assert subsample(x, 4).flatten().tolist() == [0, 2, 5, 7]
    assert subsample(x, 10) is x


def share(rank: int, world: int, folder: str) -> None:
    """One process of `world`: score a share of uneven size, write the answer."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    cut = {1: [0, 90], 2: [0, 31, 90], 3: [0, 40, 41, 90]}[world]
    metrics = score(features(120, 1), **EVERYTHING)
    for start in range(cut[rank], cut[rank + 1], 20):
        rows = slice(start, min(start + 20, cut[rank + 1]))
        metrics.update(pictures(90, 2)[rows], (torch.arange(90) % 3)[rows], CAPTIONS[rows])
    pairs, image = Reconstruction(), torch.rand(90, 1, 12, 12, generator=torch.Generator().manual_seed(0)) - 0.5
    part = image[cut[rank] : cut[rank + 1]]
    pairs.update(part, part * 0.9)
    torch.save(metrics.compute() | pairs.compute(), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_distribution_score_is_equal_on_several_processes(world, tmp_path):
    share(0, 1, str(tmp_path))
    torch.multiprocessing.spawn(share, (world, str(tmp_path)), nprocs=world)
    one = torch.load(tmp_path / "1-0.pt")
    assert one.keys() == {*KEYS, "psnr", "ssim"}
    for rank in range(world):
        assert torch.load(tmp_path / f"{world}-{rank}.pt") == pytest.approx(one, rel=1e-9)
    assert distribution.rank() == 0
