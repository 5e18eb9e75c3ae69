"""Positions of tokens on a grid of one or more sides: fixed embeddings to add, and rotations of queries and keys."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.net.attention import Rotate


def sincos(grid: Sequence[int], dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Compute sines and cosines of each position's coordinates: (N, dim) float32, the last side of the grid fastest.

    The last side comes first: in two dimensions a position's column, then its row (DiT, from MAE).
    Raises ConfigError for an odd dim, and for one too small for the sides.
    """
    angles = coordinate_angles(grid, dim, device)
    return torch.cat([part for side in reversed(angles) for part in (side.sin(), side.cos())], dim=1)


def unordered(grid: Sequence[int], dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return zeros (N, dim): without positions tokens are a set, such as the atoms of a molecule."""
    return torch.zeros(math.prod(grid), dim, device=device)


def rope(grid: Sequence[int], dim: int, device: torch.device | str = "cpu", theta: float = 10_000.0) -> Rotate:
    """Return the rotation of (B, heads, N, dim): a part of dim by each coordinate, the first side's part first.

    The product of a query and a key then depends on their distance (Su et al. 2021, eq. 34; in two dimensions Fang et
    al. 2023).
    Raises ConfigError for an odd dim, and for one too small for the sides.
    """
    angles = torch.cat(coordinate_angles(grid, dim, device, theta), dim=1)  # (N, dim / 2), for each pair of neighbours
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, dim / 2)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)

    return rotate


def coordinate_angles(
    grid: Sequence[int], dim: int, device: torch.device | str = "cpu", theta: float = 10_000.0
) -> list[Tensor]:
    """Multiply each coordinate of the grid's positions by decreasing rates: (N, rates) float32 for each side.

    The dim / 2 rates are shared out evenly; the first side has those that are left over: of a clip, time.
    """
    share, rest = divmod(dim // 2, len(grid))
    if dim % 2 or not share:
        raise ConfigError(f"positions on {len(grid)} sides need an even width of at least {2 * len(grid)}, not {dim}")
    coordinates = torch.meshgrid(*(torch.arange(side, device=device) for side in grid), indexing="ij")
    return [
        position.flatten()[:, None] * rates(share + rest * (side == 0), theta, device)
        for side, position in enumerate(coordinates)
    ]


def rates(count: int, theta: float, device: torch.device | str) -> Tensor:
    """Return `count` rates from 1 down to theta^(1 / count - 1), (count,) float32."""
    return theta ** (-torch.arange(count, device=device, dtype=torch.float32) / count)
