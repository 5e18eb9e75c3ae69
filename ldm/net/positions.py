"""Positions of tokens in an image: fixed embeddings to add, and rotations of queries and keys."""

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.net.attention import Rotate


def sincos_2d(height: int, width: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Compute sines and cosines of each position's column, then of its row: (height * width, dim) float32, row by row.

    DiT, from MAE.
    Raises ConfigError unless 4 divides dim.
    """
    column = _angles(torch.arange(width, device=device), dim).repeat(height, 1)  # (N, dim / 4)
    row = _angles(torch.arange(height, device=device), dim).repeat_interleave(width, 0)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def rope_2d(height: int, width: int, dim: int, device: torch.device | str = "cpu", theta: float = 10_000.0) -> Rotate:
    """Return the rotation of (B, heads, height * width, dim): half of dim by the row, half by the column.

    The first half of dim is rotated by the row.

    The product of a query and a key then depends on their distance (Su et al. 2021, eq. 34; in two dimensions Fang et
    al. 2023).
    Raises ConfigError unless 4 divides dim.
    """
    row = _angles(torch.arange(height, device=device), dim, theta).repeat_interleave(width, 0)
    column = _angles(torch.arange(width, device=device), dim, theta).repeat(height, 1)
    angles = torch.cat([row, column], dim=1)  # (N, dim / 2), one for each pair of neighbours
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, heads, N, dim / 2)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)

    return rotate


def _angles(position: Tensor, dim: int, theta: float = 10_000.0) -> Tensor:
    """Multiply position (N,) by dim / 4 decreasing rates: (N, dim / 4) float32."""
    if dim % 4:
        raise ConfigError(f"two-dimensional positions need a width that 4 divides, not {dim}")
    rates = theta ** (-torch.arange(dim // 4, device=position.device, dtype=torch.float32) / (dim // 4))
    return position[:, None] * rates
