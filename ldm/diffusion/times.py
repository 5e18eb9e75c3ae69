"""When to look: densities of t in training, and descending grids of t for sampling.

A density maps u in [0, 1) to t, so that it can be fed independent draws (`independent`) or evenly spread ones (`stratified`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.diffusion.schedule import Schedule
from ldm.tensors import Noise

Density = Callable[[Tensor, Schedule], Tensor]
Times = Callable[[Noise, Tensor, Schedule], Tensor]


def discrete(u: Tensor, schedule: Schedule) -> Tensor:
    """Each of 1/T, 2/T, ..., 1 alike (Ho et al. 2020, algorithm 1). Raises ValueError for a schedule without a table."""
    T = _entries(schedule)
    return ((u * T).floor() + 1) / T


def uniform(u: Tensor, schedule: Schedule) -> Tensor:
    """Uniform on (0, 1]."""
    return 1 - u


def independent(noise: Noise, x0: Tensor, schedule: Schedule, density: Density) -> Tensor:
    """One independent t (B,) float32 for each row of x0 (B, ...)."""
    return density(noise.uniform("t", x0.new_empty(len(x0), dtype=torch.float32)), schedule)


def stratified(noise: Noise, x0: Tensor, schedule: Schedule, density: Density) -> Tensor:
    """One t (B,) float32 a row, one row of the global batch in each of its equal strata (in the spirit of Kingma et al. 2021, I.1).

    The stratum is the row's position in the global batch; without one, its position in x0.
    """
    u = noise.uniform("t", x0.new_empty(len(x0), dtype=torch.float32))
    position = torch.arange(len(x0)) if noise.position is None else torch.as_tensor(noise.position)
    u = (position.to(u.device) + u) / (noise.total or len(x0))
    return density(u.clamp(max=1 - 2**-24), schedule)


def trailing(schedule: Schedule, n: int) -> Tensor:
    """n steps from t = 1 to 0 on the schedule's entries, spaced from the noise end (Lin et al. 2023, table 2): (n + 1,) float64."""
    T = _entries(schedule, n)
    return _grid((T * torch.arange(n, 0, -1, dtype=torch.float64) / n).round() / T)


def leading(schedule: Schedule, n: int, offset: int = 0) -> Tensor:
    """n steps on entries i = 0, k, 2k, ... (k = T // n) + offset, then to 0 (Song et al. 2021, appendix D.3): (n + 1,) float64."""
    T = _entries(schedule, n)
    return _grid((torch.arange(n - 1, -1, -1, dtype=torch.float64) * (T // n) + offset + 1) / T)


def uniform_grid(schedule: Schedule, n: int) -> Tensor:
    """n equal steps from t = 1 to 0: (n + 1,) float64."""
    return torch.linspace(1, 0, n + 1, dtype=torch.float64)


def _grid(ts: Tensor) -> Tensor:
    return torch.cat([ts, ts.new_zeros(1)])


def _entries(schedule: Schedule, n: int = 1) -> int:
    T = getattr(schedule, "T", None)
    if T is None:
        raise ValueError(f"{type(schedule).__name__} is continuous, it has no entries 1..T; use the option `uniform` here")
    if not 1 <= n <= T:
        raise ValueError(f"{n} steps on a schedule of {T} entries; choose 1 to {T}")
    return T
