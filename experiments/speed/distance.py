"""The Frechet distance of two sets of features, and the means and covariances it is of: ours, pytorch-fid's way and
torch-fidelity's.
"""

from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from pairs import Work, keep, paired, told
from scipy import linalg
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from ldm.metrics.distribution import frechet

Gaussian = tuple[Tensor, Tensor]  # mean (D,) and covariance (D, D), float64


def features(samples: int, dims: int, seed: int) -> Tensor:
    """Correlated features (samples, dims) float32 whose variances fall over two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(dims, dims, generator=generator) * torch.logspace(0, -1, dims) * dims**-0.5
    return torch.randn(samples, dims, generator=generator) @ mixed.T + 0.1 * torch.randn(
        samples, dims, generator=generator
    )


def gaussian(x: Tensor) -> Gaussian:
    return x.double().mean(0), x.double().T.cov()


def by_root(a: Gaussian, b: Gaussian) -> float:
    """As pytorch-fid has it: the root of the product of the covariances, of which rounding makes a complex matrix."""
    (mu1, sigma1), (mu2, sigma2) = ([part.numpy() for part in one] for one in (a, b))
    root = linalg.sqrtm(sigma1 @ sigma2)
    return float((mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root).real)


def by_eigenvalues(a: Gaussian, b: Gaussian) -> float:
    """As torch-fidelity has it: eigenvalues of the product, which is not symmetric."""
    first, second = ({"mu": mu.numpy(), "sigma": sigma.numpy()} for mu, sigma in (a, b))
    return fid_statistics_to_metric(first, second, verbose=False)[KEY_METRIC_FID]


def ours(a: Gaussian, b: Gaussian) -> float:
    return frechet(*a, *b).item()


def measure(pairs: int, threads: int, dims: int = 2048, samples: int = 10_000) -> None:
    """The distance against either peer, equal to 1e-6 of itself, and the statistics of one set of features."""
    x, y = features(samples, dims, 0), features(samples, dims, 1)
    a, b = gaussian(x), gaussian(y)
    mine, setting = ours(a, b), f"{dims:,} features"
    for peer, theirs in (
        (f"pytorch-fid's, scipy {version('scipy')} sqrtm", by_root),
        (f"torch-fidelity {version('torch-fidelity')}, eigvals", by_eigenvalues),
    ):
        apart = abs(mine / theirs(a, b) - 1)
        if apart > 1e-6:
            raise AssertionError(f"{peer}: {apart:.1e} from ours, expected 1e-6 or less")
        times = paired(partial(ours, a, b), partial(theirs, a, b), pairs)
        keep(told(Work("Frechet distance", setting, peer), threads, *times, f"{apart:.0e} of it"))
    theirs_of = fid_features_to_statistics(x)
    apart = float(np.abs(a[1].numpy() - theirs_of["sigma"]).max() / np.abs(theirs_of["sigma"]).max())
    work = Work(
        "mean and covariance", f"{samples:,} of {setting}", f"torch-fidelity {version('torch-fidelity')}, numpy"
    )
    keep(
        told(
            work,
            threads,
            *paired(partial(gaussian, x), partial(fid_features_to_statistics, x), pairs),
            f"{apart:.0e} of the largest",
        )
    )
