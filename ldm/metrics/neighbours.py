"""Samples among their nearest real images: density and coverage, and how many repeat what was trained on."""

from functools import cached_property

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.metrics.distribution import GatheredFeatures, knn_radii, squared_distances, subsample
from ldm.metrics.features import FeatureNet


def density_coverage(x: Tensor, reference: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """How many k-NN balls of reference (M, D) a row of x (N, D) lies in, over k, and the share of balls with a row in: (), ().

    Naeem et al. 2020, eq. 4 and 5; density may be above 1. Raises ConfigError if M is not above k.
    """
    if len(reference) <= k or not len(x):
        raise ConfigError(
            f"{len(x)} samples and {len(reference)} references: density and coverage need one and more than k={k}; draw more"
        )
    radius = knn_radii(reference, k)
    inside = torch.zeros(len(reference), dtype=torch.long, device=x.device)
    for d in squared_distances(x, reference):
        inside += (d <= radius).sum(0)
    return inside.sum().double() / (k * len(x)), (inside > 0).double().mean()


def memorisation(x: Tensor, reference: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How far samples x (N, D) keep from the training images (M, D), of which each has its own nearest neighbour among the others: (), ().

    authenticity: the share of samples that are further from the nearest training image than that image is from the rest of the training
    set (Alaa et al. 2022, section 3.2).  copies: the share at least as near as only 1% of the training images are to another.  Held-out
    images give what is normal.  own: radii(reference, 1), where that is known.
    Raises ConfigError for fewer than 2 training images, or no sample.
    """
    if len(reference) < 2 or not len(x):
        raise ConfigError(
            f"{len(x)} samples and {len(reference)} training images: memorisation needs one and two; draw more"
        )
    own = knn_radii(reference, 1) if own is None else own
    found = [d.min(1) for d in squared_distances(x, reference)]
    distance, index = (torch.cat([getattr(one, part) for one in found]) for part in ("values", "indices"))
    close = own.sort().values[len(own) // 100]
    return (distance > own[index]).double().mean(), (distance <= close).double().mean()


class DensityCoverage(GatheredFeatures):
    """`density` and `coverage` of all samples against reference_size evenly spaced references, by k nearest neighbours."""

    names = ("density", "coverage")

    def __init__(self, net: FeatureNet, reference: Tensor, k: int = 5, reference_size: int = 5000):
        super().__init__(net, reference)
        self.k, self.reference = k, subsample(reference, reference_size)

    def compute(self) -> dict[str, float]:
        density, coverage = density_coverage(self.values(), self.reference, self.k)
        return {"density": density.item(), "coverage": coverage.item()}


class Memorisation(GatheredFeatures):
    """`authenticity` and `copies` of all samples against the whole training set, whose neighbours are found once."""

    names = ("authenticity", "copies")

    def __init__(self, net: FeatureNet, reference: Tensor):
        super().__init__(net, reference)
        self.reference = reference

    @cached_property
    def reference_distances(self) -> Tensor:
        """How far each training image is from the rest."""
        return knn_radii(self.reference, 1)

    def compute(self) -> dict[str, float]:
        authenticity, copies = memorisation(self.values(), self.reference, self.reference_distances)
        return {"authenticity": authenticity.item(), "copies": copies.item()}
