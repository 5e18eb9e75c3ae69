"""Distances between the distributions of two sets of features, and MetricSuite, which computes several at once."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError, UserError
from ldm.io.images import to_uint8
from ldm.metrics.features import Classifier, FeatureNet


def frechet(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> Tensor:
    """Return the squared Frechet distance () of two Gaussians (Heusel et al. 2017, eq. 6), in float64.

    mu1, mu2: means (D,).  sigma1, sigma2: covariances (D, D).
    With S1 = L L', tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric L' S2 L, which
    avoids matrix square roots and complex numbers.
    """
    mu1, sigma1, mu2, sigma2 = (x.double() for x in (mu1, sigma1, mu2, sigma2))
    root, failed = torch.linalg.cholesky_ex(sigma1)
    if failed:  # only semi-definite: fewer samples than dimensions, or a dead feature
        values, vectors = torch.linalg.eigh(sigma1)
        root = vectors * values.clamp(min=0).sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    return (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap


def polynomial_mmd(x: Tensor, y: Tensor, degree: int = 3) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy () under k(a, b) = (a.b / D + 1)^degree, in float64.

    x: (N, D).  y: (M, D).  Binkowski et al. 2018, eq. 4. Negative values are within its noise.
    """

    def total(a: Tensor, b: Tensor) -> Tensor:
        return sum(((block.double() @ b.double().T / b.shape[1] + 1) ** degree).sum() for block in a.split(256))

    def within(a: Tensor) -> Tensor:
        itself = ((a.double().square().sum(1) / a.shape[1] + 1) ** degree).sum()
        return (total(a, a) - itself) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y))


def squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield squared Euclidean distances in float64 from a (N, D) to b (M, D), in blocks (n, M).

    They are exactly 0 between equal rows.
    """
    b = b.double()
    for block in a.double().split(256):
        norms = block.square().sum(1, keepdim=True) + b.square().sum(1)
        d = torch.addmm(norms, block, b.T, alpha=-2)
        # closer than different float32 features can be: the product's rounding error
        yield d.masked_fill_(d < 1e-14 * norms, 0)


def knn_radii(x: Tensor, k: int) -> Tensor:
    """Return the squared distance (N,) from each row of x (N, D) to its k-th nearest other row."""
    # k + 1, as the nearest is the row itself
    return torch.cat([d.topk(k + 1, 1, largest=False).values[:, -1] for d in squared_distances(x, x)])


def coverage_fraction(points: Tensor, centres: Tensor, radius: Tensor) -> Tensor:
    """Return the fraction () of points (N, D) in any of the balls with centres (M, D) and squared radii (M,)."""
    return torch.cat([(d <= radius).any(1) for d in squared_distances(points, centres)]).double().mean()


def precision_recall(x: Tensor, reference: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Return precision and recall (), () (Kynkaanniemi et al. 2019, eq. 2).

    Precision is the fraction of x (N, D) on the k-NN manifold of the reference, recall that of reference (M, D) on x's.
    Both depend on N and M: compare only numbers for the same sizes. Raises ConfigError if N or M is not above k.
    """
    if min(len(x), len(reference)) <= k:
        raise ConfigError(
            f"{len(x)} samples and {len(reference)} references: precision and recall need more than k={k} of each; "
            f"draw more"
        )
    return coverage_fraction(x, reference, knn_radii(reference, k)), coverage_fraction(reference, x, knn_radii(x, k))


def gaussian_mmd(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """Return the squared maximum mean discrepancy () under k(a, b) = exp(-|a - b|^2 / (2 sigma^2)), in float64.

    x: (N, D).  y: (M, D).  Jayasumana et al. 2024, eq. 2, with the estimator of their code, which includes each row's
    distance to itself: 0 for equal sets.
    """

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(-d / (2 * sigma**2)).exp().sum() for d in squared_distances(a, b)]).sum() / (
            len(a) * len(b)
        )

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def subsample(x: Tensor, size: int) -> Tensor:
    """Return at most `size` rows of x (N, D), evenly spaced."""
    return x if len(x) <= size else x[torch.arange(size, device=x.device) * len(x) // size]


class Metric(Protocol):
    """A metric of a MetricSuite: constructed from (net, reference features), updated batch by batch.

    update: features (B, D) float32, labels (B,) and captions with which the samples were generated, None if unknown.
    compute: {key: number} over all processes, called on each of them.
    reset: forget the samples, keep the reference.
    A class may list its keys in `names`, with {net} for the network's name, so that keep_best= is checked early.
    """

    def update(self, features: Tensor, label: Tensor | None, caption: Sequence[str] | None) -> None: ...
    def compute(self) -> dict[str, float]: ...
    def reset(self) -> None: ...


class PrecomputedFeatures(nn.Identity):
    """A stand-in for the feature network that torchmetrics requires; its inputs are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


class FrechetDistance:
    """`fd_<net>`: torchmetrics' FrechetInceptionDistance on precomputed features; float64 sums over processes."""

    names = ("fd_{net}",)

    def __init__(self, net: FeatureNet, reference: Tensor):
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.key = f"fd_{net.name}"
        self.fid = FrechetInceptionDistance(PrecomputedFeatures(net.num_features)).to(reference.device)
        self.fid.update(reference, real=True)
        names = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")
        self.reference = {name: getattr(self.fid, name) for name in names}
        self.fid.reset()

    def update(self, features: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        self.fid.update(features.double(), real=False)  # torchmetrics returns the dtype of its last input

    def compute(self) -> dict[str, float]:
        # torchmetrics sums the states over the processes: only one of them contributes the reference
        for name, value in self.reference.items():
            setattr(self.fid, name, value if rank() == 0 else torch.zeros_like(value))
        return {self.key: self.fid.compute().item()}

    def reset(self) -> None:
        self.fid.reset()


class GatheredFeatures:
    """Base of the metrics that need all samples' features at once; `values` gathers them over all processes."""

    def __init__(self, net: FeatureNet, reference: Tensor):
        from torchmetrics.aggregation import CatMetric

        self.samples = CatMetric(nan_strategy="error").to(reference.device)

    def update(self, features: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        self.samples.update(features)

    def values(self) -> Tensor:
        """Return all rows (N, D) passed to update, concatenated over processes."""
        return self.samples.compute()

    def reset(self) -> None:
        self.samples.reset()


class KernelDistance(GatheredFeatures):
    """`kid_<net>`: the unbiased polynomial MMD of all samples against reference_size evenly spaced references.

    torchmetrics' KernelInceptionDistance averages the same estimator over random subsets, so its result changes with
    the random state and the samples' order.
    Over all pairs it is deterministic, independent of order and process count, and has less variance.
    """

    names = ("kid_{net}",)

    def __init__(self, net: FeatureNet, reference: Tensor, degree: int = 3, reference_size: int = 5000):
        super().__init__(net, reference)
        self.key, self.degree = f"kid_{net.name}", degree
        self.reference = subsample(reference, reference_size)

    def compute(self) -> dict[str, float]:
        return {self.key: polynomial_mmd(self.values(), self.reference, self.degree).item()}


class PrecisionRecall(GatheredFeatures):
    """`precision` and `recall` by k nearest neighbours, against reference_size evenly spaced references."""

    names = ("precision", "recall")

    def __init__(self, net: FeatureNet, reference: Tensor, k: int = 3, reference_size: int = 5000):
        super().__init__(net, reference)
        self.k, self.reference = k, subsample(reference, reference_size)

    def compute(self) -> dict[str, float]:
        precision, recall = precision_recall(self.values(), self.reference, self.k)
        return {"precision": precision.item(), "recall": recall.item()}


class ClassAccuracy:
    """`accuracy`: the fraction of samples that the network classifies as the class they were generated for."""

    names = ("accuracy",)

    def __init__(self, net: Classifier, reference: Tensor):
        from torchmetrics.aggregation import MeanMetric

        self.classify = net.classify
        self.right = MeanMetric(nan_strategy="error").to(reference.device)

    def update(self, features: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        if label is None:
            raise ConfigError(
                "class accuracy needs the label each sample was generated for, got None; "
                "pass label, or leave accuracy out of the metrics"
            )
        self.right.update((self.classify(features).argmax(1) == label.to(features.device)).float())

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.right.compute().item()}

    def reset(self) -> None:
        self.right.reset()


class GaussianDistance(GatheredFeatures):
    """`cmmd_<net>`: 1,000 times the Gaussian MMD; with CLIP's image tower it is CMMD (Jayasumana et al. 2024)."""

    names = ("cmmd_{net}",)

    def __init__(self, net: FeatureNet, reference: Tensor, sigma: float = 10.0, reference_size: int = 30000):
        super().__init__(net, reference)
        self.key, self.sigma = f"cmmd_{net.name}", sigma
        self.reference = subsample(reference, reference_size)

    def compute(self) -> dict[str, float]:
        return {self.key: 1000 * gaussian_mmd(self.values(), self.reference, self.sigma).item()}


class MetricSuite:
    """All metrics of a set of images, from one pass of the feature network.

    net: in evaluation mode.  reference: its features (N, D) of real images (see `extract`), on the network's device.
    metrics: name -> (net, reference) -> Metric.
    With several processes each updates with its own samples, unpadded (a DistributedSampler repeats some, which changes
    the numbers), and all call compute. Raises ValueError for a reference that does not fit or is not finite.
    """

    def __init__(
        self, net: FeatureNet, reference: Tensor, metrics: Mapping[str, Callable[[FeatureNet, Tensor], Metric]]
    ):
        from torchmetrics.aggregation import SumMetric

        if reference.ndim != 2 or reference.shape[1] != net.num_features or len(reference) < 2:
            raise ConfigError(
                f"reference is {tuple(reference.shape)}: expected at least 2 rows of {net.num_features} features of "
                f"{net.name}; see extract"
            )
        require_finite(reference, "reference")
        self.net, self.reference = net, reference
        self.metrics = {name: make(net, reference) for name, make in metrics.items()}
        self.count = SumMetric(nan_strategy="error").to(reference.device)

    @property
    def provenance(self) -> dict[str, str | int]:
        """What must be equal for two scores to be compared, besides n.

        These are the network and its weights, how images are prepared for it, and the size of the reference.
        """
        pixels = {"resize": getattr(self.net, "resize", "none"), "quantisation": "clamped and rounded to 256 levels"}
        return {"network": self.net.name, "identity": self.net.identity, **pixels, "reference": len(self.reference)}

    @torch.no_grad()
    def update(self, image: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        """Add images (B, C, H, W) in [-1, 1] and the labels (B,) and captions they were generated for.

        Raises UserError for NaN.
        """
        features = self.net(to_uint8(image))
        require_finite(features, "features")
        for metric in self.metrics.values():
            metric.update(features, label, caption)
        self.count.update(float(len(features)))

    def compute(self) -> dict[str, float]:
        """Return {key: number} and the sample count n, over all processes.

        Warns if n is so small that bias dominates. Raises ConfigError for n < 2.
        """
        n = int(self.count.compute())
        if n < 2:
            raise ConfigError(
                f"{n} samples to score: expected at least 2, and thousands for a meaningful number; raise num"
            )
        enough = max(2048, 2 * self.reference.shape[1])
        if n < enough and rank() == 0:
            warnings.warn(
                f"{n} samples with {self.reference.shape[1]} features: distances are biased upwards below {enough}",
                stacklevel=2,
            )
        return {"n": n} | {key: value for metric in self.metrics.values() for key, value in metric.compute().items()}

    def reset(self) -> None:
        """Drop the samples and keep the reference."""
        self.count.reset()
        for metric in self.metrics.values():
            metric.reset()


def require_finite(features: Tensor, what: str) -> None:
    """Raise UserError if any feature is NaN or infinite: torchmetrics would return NaN without an error."""
    broken = int((~features.isfinite()).any(1).sum())
    if broken:
        raise UserError(
            f"{what}: {broken} of {len(features)} rows are not finite; the images or the network are broken"
        )


def rank() -> int:
    """Return this process's rank, 0 without process group."""
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )
