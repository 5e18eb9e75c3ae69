"""Predictions: the network's output is out = a x0 + b eps, with one row (a, b) per prediction.

Together with x_t = alpha x0 + sigma eps this is a 2x2 system.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.tensors import expand


class Prediction(Protocol):
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (a, b), shaped like alpha."""
        ...

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the factor on the network's input x_t, shaped like alpha."""
        ...


class _Unscaled:
    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.ones_like(alpha)


@dataclass(frozen=True)
class Eps(_Unscaled):
    """The noise (Ho et al. 2020, eq. 11)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class X0(_Unscaled):
    """The data (Ho et al. 2020, section 3.2)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(alpha)


@dataclass(frozen=True)
class Regression(X0):
    """The data from the condition alone: the network's input x_t is 0, so that it returns a conditional mean.

    With the schedule pde_refiner(steps=0), which has t = 1 alone, this is least-squares regression.
    """

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.zeros_like(alpha)


@dataclass(frozen=True)
class V(_Unscaled):
    """v = alpha eps - sigma x0 (Salimans & Ho 2022, section 4)."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, alpha


@dataclass(frozen=True)
class Flow(_Unscaled):
    """eps - x0, the velocity of a straight path from data to noise.

    Liu et al. 2022, eq. 1; Lipman et al. 2022, eq. 23.
    """

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class EDM(_Unscaled):
    """The preconditioned target F (Karras et al. 2022, eq. 7-8, table 1) of data with standard deviation sigma_data.

    Written for any alpha by applying the paper's alpha = 1 to x_t / alpha; with sigma_data = 1 and alpha^2 + sigma^2 =
    1 it is -v.
    """

    sigma_data: float = 0.5

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.input_scale(alpha, sigma)
        return sigma / self.sigma_data * scale, -alpha * self.sigma_data * scale

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return (sigma**2 + (alpha * self.sigma_data) ** 2).rsqrt()


def target(row: tuple[Tensor, Tensor], x0: Tensor, eps: Tensor) -> Tensor:
    """Return the output a x0 + b eps (B, ...) of an exact network; row entries are () or (B,)."""
    a, b = row
    return expand(a, x0) * x0 + expand(b, x0) * eps


def solve(row: tuple[Tensor, Tensor], alpha: Tensor, sigma: Tensor, x_t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Solve (x_t, out) = (alpha x0 + sigma eps, a x0 + b eps) for (x0, eps), (B, ...) each."""
    a, b = row
    det = alpha * b - sigma * a
    x0 = expand(b / det, x_t) * x_t - expand(sigma / det, x_t) * out
    eps = expand(alpha / det, x_t) * out - expand(a / det, x_t) * x_t
    return x0, eps


def output_gain(row: tuple[Tensor, Tensor], alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return (det / sigma)^2: squared error of the output per squared error of x0, at fixed x_t."""
    a, b = row
    return ((alpha * b - sigma * a) / sigma) ** 2
