"""Metrics by nearest real images: density and coverage, and memorisation of the training set."""

from functools import cached_property

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.metrics.distribution import GatheredFeatures, knn_radii, squared_distances, subsample
from ldm.metrics.features import FeatureNet


def density_coverage(x: Tensor, reference: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """Return density and coverage (), () of x (N, D) and reference (M, D) (Naeem et al. 2020, eq. 4 and 5).

    Density is the mean number of k-NN balls of the reference that contain a row of x, divided by k, and may be above 1;
    coverage is the fraction of the balls that contain a row of x. Raises ConfigError if M is not above k.
    """
    if len(reference) <= k or not len(x):
        raise ConfigError(
            f"{len(x)} samples and {len(reference)} references: "
            f"density and coverage need at least one and more than k={k}; draw more"
        )
    radius = knn_radii(reference, k)
    inside = torch.zeros(len(reference), dtype=torch.long, device=x.device)
    for d in squared_distances(x, reference):
        inside += (d <= radius).sum(0)
    return inside.sum().double() / (k * len(x)), (inside > 0).double().mean()


def memorisation(x: Tensor, reference: Tensor, radii: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return authenticity and copies (), () of samples x (N, D) and training images (M, D).

    Authenticity is the fraction of samples further from the nearest training image than that image is from the rest of
    the training set (Alaa et al. 2022, section 3.2). Copies is the fraction at most as far from a training image as the
    closest 1% of the training images are from another. Held-out images give the normal values.
    radii: knn_radii(reference, 1), if already known.
    Raises ConfigError for fewer than 2 training images, or no sample.
    """
    if len(reference) < 2 or not len(x):
        raise ConfigError(
            f"{len(x)} samples and {len(reference)} training images: memorisation needs at least one and two; draw more"
        )
    radii = knn_radii(reference, 1) if radii is None else radii
    nearest = [d.min(1) for d in squared_distances(x, reference)]
    distance, index = (torch.cat([getattr(block, part) for block in nearest]) for part in ("values", "indices"))
    close = radii.sort().values[len(radii) // 100]
    return (distance > radii[index]).double().mean(), (distance <= close).double().mean()


class DensityCoverage(GatheredFeatures):
    """`density` and `coverage` by k nearest neighbours, against reference_size evenly spaced references."""

    names = ("density", "coverage")

    def __init__(self, net: FeatureNet, reference: Tensor, k: int = 5, reference_size: int = 5000):
        super().__init__(net, reference)
        self.k, self.reference = k, subsample(reference, reference_size)

    def compute(self) -> dict[str, float]:
        density, coverage = density_coverage(self.values(), self.reference, self.k)
        return {"density": density.item(), "coverage": coverage.item()}


class Memorisation(GatheredFeatures):
    """`authenticity` and `copies` of all samples against the training set, whose own neighbours are computed once."""

    names = ("authenticity", "copies")

    def __init__(self, net: FeatureNet, reference: Tensor):
        super().__init__(net, reference)
        self.reference = reference

    @cached_property
    def reference_distances(self) -> Tensor:
        """Squared distance (M,) of each training image from its nearest neighbour in the rest."""
        return knn_radii(self.reference, 1)

    def compute(self) -> dict[str, float]:
        authenticity, copies = memorisation(self.values(), self.reference, self.reference_distances)
        return {"authenticity": authenticity.item(), "copies": copies.item()}
