"""Baselines for scores: a model that needs no network, and real images with noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise


@dataclass(frozen=True)
class PCAGaussian:
    """A Gaussian per class on the leading principal components of its pixels.

    mean: (K, d).  basis: (K, d, rank), columns scaled by each component's standard deviation.
    shape: (C, H, W), d = CHW.
    """

    mean: Tensor
    basis: Tensor
    shape: tuple[int, ...]

    @classmethod
    def fit(cls, image: Tensor, label: Tensor, rank: int = 50) -> "PCAGaussian":
        """Fit on images (N, C, H, W) in [-1, 1] and labels (N,) 0..K-1, in float64; N or d up to a few thousand.

        Raises ConfigError if a class has no more than rank images.
        """
        counts = label.bincount()
        fewest = int(counts.min())
        if fewest <= rank:
            raise ConfigError(
                f"class {int(counts.argmin())} has {fewest} images: expected more than rank={rank}; "
                f"lower rank or give more images"
            )
        means, bases = [], []
        for k in range(len(counts)):
            x = image[label == k].flatten(1).double()
            means.append(x.mean(0))
            bases.append(_principal(x, rank))
        return cls(torch.stack(means).float(), torch.stack(bases).float(), tuple(image.shape[1:]))

    def sample(self, label: Tensor, noise: KeyedNoise) -> Tensor:
        """Draw images (B, C, H, W) in [-1, 1], clipped, of the classes `label` (B,)."""
        code = noise.normal("pca", self.mean.new_zeros(len(label), self.basis.shape[-1]))  # (B, rank)
        x = self.mean[label]  # (B, d)
        for k in label.unique():
            rows = label == k
            x[rows] += code[rows] @ self.basis[k].T
        return x.unflatten(1, self.shape).clamp(-1, 1)


def _principal(x: Tensor, rank: int) -> Tensor:
    """Return the leading principal components (d, rank) of x (N, d), each times its standard deviation, ascending."""
    if len(x) >= x.shape[1]:
        variance, vectors = torch.linalg.eigh(x.T.cov())
        return vectors[:, -rank:] * variance[-rank:].clamp(min=0).sqrt()
    centred = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    _, vectors = torch.linalg.eigh(centred @ centred.T)  # of the smaller matrix with the same eigenvalues
    return centred.T @ vectors[:, -rank:]


def add_noise(image: Tensor, std: float, noise: KeyedNoise) -> Tensor:
    """Add Gaussian noise to images (B, C, H, W) in [-1, 1] and clip.

    std: standard deviation of the noise, as a fraction of the range from black to white, which is 2 here.
    """
    return (image + 2 * std * noise.normal("noisy", image)).clamp(-1, 1)
