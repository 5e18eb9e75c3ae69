"""Latte's factorised blocks (Ma et al. 2024, fig. 2a): self-attention within a frame, and along time, in turn."""

from collections.abc import Callable, Sequence

from torch import Tensor

from ldm.net.attention import Rotate
from ldm.net.dit import DiTBlock

Fold = Callable[[Tensor], Tensor]


class SpatialBlock(DiTBlock):
    """A DiTBlock whose tokens attend to those of their own frame; the first side of the grid is time."""

    def attend(self, x: Tensor, rotate: Rotate | None, grid: Sequence[int]) -> Tensor:
        batch, frames = len(x), grid[0]

        def fold(h: Tensor) -> Tensor:
            """(B, ..., F n, C) -> (B F, ..., n, C)"""
            return h.unflatten(-2, (frames, -1)).movedim(-3, 1).flatten(0, 1)

        def unfold(h: Tensor) -> Tensor:
            return h.unflatten(0, (batch, frames)).movedim(1, -3).flatten(-3, -2)

        return unfold(self.attention(fold(x), folded(rotate, fold, unfold)))


class TemporalBlock(DiTBlock):
    """A DiTBlock whose tokens attend to those at their own place in all frames; the first side of the grid is time."""

    def attend(self, x: Tensor, rotate: Rotate | None, grid: Sequence[int]) -> Tensor:
        batch, frames = len(x), grid[0]

        def fold(h: Tensor) -> Tensor:
            """(B, ..., F n, C) -> (B n, ..., F, C)"""
            return h.unflatten(-2, (frames, -1)).movedim(-2, 1).flatten(0, 1)

        def unfold(h: Tensor) -> Tensor:
            return h.unflatten(0, (batch, -1)).movedim(1, -2).flatten(-3, -2)

        return unfold(self.attention(fold(x), folded(rotate, fold, unfold)))


def folded(rotate: Rotate | None, fold: Fold, unfold: Fold) -> Rotate | None:
    """Return the rotation of folded tokens for one of all tokens of the grid."""
    return None if rotate is None else lambda x: fold(rotate(unfold(x)))
