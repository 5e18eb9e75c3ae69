"""The metric: how many different samples there are."""

import torch
from torch.nn.functional import normalize

from ldm.metrics.distribution import GatheredFeatures


class Vendi(GatheredFeatures):
    """`vendi`: exp of the entropy of the eigenvalues of K / n, K the n samples' cosines (Friedman & Dieng 2023, eq. 2).

    n for orthogonal features, 1 for equal ones.
    """

    names = ("vendi",)

    def compute(self) -> dict[str, float]:
        rows = normalize(self.values().double())  # (n, D)
        eigenvalues = torch.linalg.eigvalsh(rows.T @ rows / len(rows))  # those of K / n, and zeros
        return {"vendi": torch.special.entr(eigenvalues.clamp(min=0)).sum().exp().item()}
