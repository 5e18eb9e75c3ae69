"""Confidence intervals of numbers estimated from few samples."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the interval of a probability from `hits` in `total` independent trials (Wilson 1927); z = 1.96: 95%."""
    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"{hits} hits of {total}: expected 0 to total hits, and at least one trial")
    p, square = hits / total, z * z
    middle = (p + square / (2 * total)) / (1 + square / total)
    reach = z * (p * (1 - p) / total + square / (4 * total**2)) ** 0.5 / (1 + square / total)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def bootstrap(values: Tensor, level: float = 0.95, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return the interval of the mean of values (N,) by bootstrap: resampling N of them, percentiles (Efron 1979)."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values of {tuple(values.shape)}: expected one number for each of at least one case")
    rows = torch.randint(len(values), (rounds, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = (
        values.double()[rows]
        .mean(1)
        .quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64))
        .tolist()
    )
    return low, high


def paired(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the mean of two or more paired differences, normal of unknown variance (Student 1908)."""
    n = len(differences)
    if n < 2:
        raise ValueError(
            f"{n} difference{'s' * (n != 1)}: expected two or more; one pair gives no estimate of the spread"
        )
    mean = sum(differences) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in differences) / (n - 1))
    reach = t_quantile(level, n - 1) * deviation / math.sqrt(n)
    return mean - reach, mean + reach


def t_quantile(level: float, freedom: int) -> float:
    """Return t with P(|T| <= t) = level for Student's distribution with `freedom` degrees of freedom."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < level:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < level else (low, middle)
    return high


def t_cdf(t: float, freedom: int) -> float:
    """Return P(|T| <= t) for Student's distribution (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= math.cos(angle) ** 2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
