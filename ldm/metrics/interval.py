"""How far a number may be from the truth for having been taken on so few."""

import torch
from torch import Tensor


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a probability of which `hits` of `total` independent trials came out (Wilson 1927); z = 1.96: 95%."""
    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"{hits} hits of {total}: expected 0 to all of one trial or more")
    p, square = hits / total, z * z
    middle = (p + square / (2 * total)) / (1 + square / total)
    reach = z * (p * (1 - p) / total + square / (4 * total**2)) ** 0.5 / (1 + square / total)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def bootstrap(values: Tensor, level: float = 0.95, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The interval of the mean of values (N,) of N independent cases, by drawing N of them again and again (Efron 1979, percentiles)."""
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values of {tuple(values.shape)}: expected one number for each of one case or more")
    rows = torch.randint(len(values), (rounds, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = values.double()[rows].mean(1).quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high
