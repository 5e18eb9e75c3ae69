"""Loss weights w(alpha, sigma, row): the weight on the squared error of x0, so that each serves every prediction.

The loss itself is computed on the network's output and scaled by w / gain (prediction.output_gain). SNR = (alpha /
sigma)^2.
Shapes: () or (B,).
"""

from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.prediction import EDM, Flow, V, output_gain
from ldm.diffusion.schedule import Schedule

Row = tuple[Tensor, Tensor]
Weighting = Callable[[Tensor, Tensor, Row], Tensor]


def output(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Weight the error of the network's output by 1, whatever it predicts."""
    return output_gain(row, alpha, sigma)


def eps(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Weight the error of eps by 1: L_simple (Ho et al. 2020, eq. 14)."""
    return (alpha / sigma) ** 2


def x0(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Weight the error of x0 by 1."""
    return sigma.new_ones(sigma.shape)


def v(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Weight the error of v by 1: SNR + 1 where alpha^2 + sigma^2 = 1 (Salimans & Ho 2022, section 4)."""
    return output_gain(V().coefficients(alpha, sigma), alpha, sigma)


def flow(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Weight the error of eps - x0 by 1: (1 + sqrt(SNR))^2 (Liu et al. 2022, eq. 1)."""
    return output_gain(Flow().coefficients(alpha, sigma), alpha, sigma)


def min_snr(alpha: Tensor, sigma: Tensor, row: Row, gamma: float = 5.0) -> Tensor:
    """Return min(SNR, gamma) (Hang et al. 2023, section 3.4)."""
    return ((alpha / sigma) ** 2).clamp(max=gamma)


def soft_min_snr(alpha: Tensor, sigma: Tensor, row: Row, gamma: float = 5.0) -> Tensor:
    """Return SNR gamma / (SNR + gamma), a smooth Min-SNR (Crowson et al. 2024 (HDiT), eq. 5, where gamma is 4)."""
    snr = (alpha / sigma) ** 2
    return snr * gamma / (snr + gamma)


def debiased(alpha: Tensor, sigma: Tensor, row: Row) -> Tensor:
    """Return sqrt(SNR): the error of eps over sqrt(SNR) (Yu et al. 2024, section 3.2)."""
    return alpha / sigma


def p2(alpha: Tensor, sigma: Tensor, row: Row, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """Return SNR / (k + SNR)^gamma: the error of eps over (k + SNR)^gamma (Choi et al. 2022)."""
    snr = (alpha / sigma) ** 2
    return snr / (k + snr) ** gamma


def edm(alpha: Tensor, sigma: Tensor, row: Row, sigma_data: float = 0.5) -> Tensor:
    """Weight the error of EDM's F by 1: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 at alpha = 1.

    Karras et al. 2022, table 1.
    """
    return output_gain(EDM(sigma_data).coefficients(alpha, sigma), alpha, sigma)


def vlb(alpha: Tensor, sigma: Tensor, row: Row, schedule: Schedule, T: int = 1000) -> Tensor:
    """Return T / 2 (SNR(t - 1/T) - SNR(t)): the diffusion loss of T steps, t uniform.

    Kingma et al. 2021, eq. 13; Ho et al. 2020, eq. 12.
    t = 1/T, whose own term is the decoder's, has the weight of 2/T.
    """
    # in float64: the two differ by a part in T
    t = schedule.t_from_log_snr(2 * (alpha.double() / sigma.double()).log()).clamp(min=2 / T)
    return (T / 2 * (schedule.log_snr(t - 1 / T).exp() - schedule.log_snr(t).exp())).to(sigma)
