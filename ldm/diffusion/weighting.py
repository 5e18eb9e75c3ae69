"""Loss weights w(alpha, sigma, row): the weight on the squared error of x0, so that each serves every prediction.

The loss itself is taken on the network's output and scaled by w / gain (prediction.gain). SNR = (alpha / sigma)^2. Shapes: () or (B,).
"""

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.prediction import Flow, V, gain

Row = tuple[Tensor, Tensor]
Weighting = Callable[[Tensor, Tensor, Row], Tensor]


def output(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Plain error of whatever the network predicts."""
    return gain(row, alpha, sigma)


def eps(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Plain error of eps: L_simple (Ho et al. 2020, eq. 14)."""
    return (alpha / sigma) ** 2


def x0(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Plain error of x0."""
    return sigma.new_ones(sigma.shape)


def v(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Plain error of v: SNR + 1 where alpha^2 + sigma^2 = 1 (Salimans & Ho 2022, section 4)."""
    return gain(V().row(alpha, sigma), alpha, sigma)


def flow(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Plain error of eps - x0: (1 + sqrt(SNR))^2 (Esser et al. 2024, section 3)."""
    return gain(Flow().row(alpha, sigma), alpha, sigma)


def min_snr(alpha: Tensor, sigma: Tensor, row: Row, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, eq. 8)."""
    return ((alpha / sigma) ** 2).clamp(max=gamma)
