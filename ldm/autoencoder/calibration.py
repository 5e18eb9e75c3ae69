"""Normalisation of a latent space, z = (raw - shift) * scale: shift and scale from its statistics over a data set."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.autoencoder.posterior import DeterministicPosterior, DiagonalGaussian
from ldm.errors import ConfigError


@dataclass(frozen=True)
class Statistics:
    """Mean and variance (C,) float64 of posterior samples per channel, over `images` images."""

    mean: Tensor
    variance: Tensor
    images: int

    @staticmethod
    def of(
        posteriors: Iterable[DiagonalGaussian | DeterministicPosterior],
        channels: int,
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
    ) -> "Statistics":
        """Compute the statistics of posteriors over (B, C, ...), batch by batch, in closed form: no sample is drawn.

        total: sums a vector over all processes, each of which has its share of the data.  Raises ConfigError if there
        are no posteriors.
        """
        # images, positions, then sum and sum of squares of each channel
        sums = torch.zeros(2 * channels + 2, dtype=torch.float64)
        for posterior in posteriors:
            mean, variance = posterior.mean.double(), posterior.variance.double()
            axes = (0, *range(2, mean.ndim))
            first, second = mean.sum(axes), (mean.square() + variance).sum(axes)
            sums += torch.cat([sums.new_tensor([len(mean), mean[:, 0].numel()]), first.cpu(), second.cpu()])
        images, positions, *rest = total(sums).tolist()
        if not images:
            raise ConfigError("no latents to calibrate on: the data set is empty")
        first, second = torch.tensor(rest, dtype=torch.float64).div(positions).chunk(2)
        return Statistics(first, second - first.square(), round(images))


Calibration = Callable[[Statistics], tuple[Tensor, Tensor]]  # -> shift, scale, each (C,)


def per_channel(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return shift and scale for mean 0 and variance 1 in every channel."""
    return statistics.mean, statistics.variance.rsqrt()


def scalar(statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return no shift and one scale for all channels, 1 / standard deviation of all numbers.

    LDM app. G; Stable Diffusion's 0.18215.
    """
    mean = statistics.mean.mean()
    variance = (statistics.variance + statistics.mean.square()).mean() - mean.square()
    return torch.zeros_like(statistics.mean), variance.rsqrt().expand_as(statistics.mean)


def fixed(statistics: Statistics, scale: float = 0.18215, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return a published scale and shift, independent of the data."""
    return torch.full_like(statistics.mean, shift), torch.full_like(statistics.mean, scale)
