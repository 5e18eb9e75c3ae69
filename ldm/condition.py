"""The conditions of a network: its inputs besides x_t and t."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.errors import ConfigError


@dataclass(frozen=True)
class Condition:
    """The inputs of a network besides x_t and t; a field that is None (or an empty tuple) is not used.

    context: (B, L, D) tokens for cross-attention.  mask: (B, L) bool, True = a real token.
    vector: (B, D) added to the time embedding.
    concat: (B, C, ...) concatenated to x_t's channels; one whose sides are all 1, of any number of sides, broadcasts
    over all positions.
    hint: (B, 3, H, W) each, one per ControlNet, in [0, 1]; H = W = 1 broadcasts.
    label: (B,) int64, the class, for classifier guidance; networks do not read it.
    scale: (B,), the guidance scale, for a network distilled to take it.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    concat: Tensor | None = None
    hint: tuple[Tensor, ...] = ()
    label: Tensor | None = None
    scale: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> "Condition":
        """Apply f to every tensor."""
        values: dict[str, Any] = {x.name: getattr(self, x.name) for x in fields(self)}
        changed: dict[str, Any] = {
            k: tuple(map(f, v)) if isinstance(v, tuple) else f(v) for k, v in values.items() if v is not None
        }
        return replace(self, **changed)

    def to(self, *args, **kwargs) -> "Condition":
        """Move or cast as Tensor.to does; the boolean mask keeps its dtype."""
        return self.map(
            lambda v: v.to(*args, **kwargs) if v.is_floating_point() else v.to(v.to(*args, **kwargs).device)
        )

    def index(self, rows: slice | Tensor | Sequence[int]) -> "Condition":
        """Select rows of every tensor."""
        return self.map(lambda v: v[rows])

    def where(self, keep: Tensor, other: "Condition") -> "Condition":
        """Choose row by row: self where keep (B,) is True, other elsewhere.

        Condition dropout, Ho & Salimans 2022, algorithm 1.  Raises ValueError if the fields in use differ.
        """
        a, b = align_fields(self, other)

        def choose(x: Tensor, y: Tensor) -> Tensor:
            return torch.where(keep.to(x.device).reshape(-1, *[1] * (x.ndim - 1)), x, y)

        chosen = {}
        for name in ("context", "mask", "vector", "concat"):
            if (value := getattr(a, name)) is not None:
                chosen[name] = choose(value, getattr(b, name))
        return Condition(**chosen, hint=tuple(map(choose, a.hint, b.hint)), label=a.label)

    def expand_concat(self, *sides: int) -> "Condition":
        """Expand a concat whose sides are all 1 to these. Raises ConfigError for a concat of another size."""
        if self.concat is None or self.concat.shape[2:] == sides:
            return self
        if set(self.concat.shape[2:]) != {1}:
            condition, latent = ("x".join(map(str, one)) for one in (self.concat.shape[2:], sides))
            raise ConfigError(
                f"the condition is for latents of {condition}, those to be sampled are {latent}; "
                "give both the same size in pixels"
            )
        return replace(self, concat=expand_sides(self.concat, sides))

    def cat(self, *others: "Condition") -> "Condition":
        """Concatenate batches; shorter contexts are padded with masked tokens.

        Raises ValueError if the fields in use differ.
        """
        parts = align_fields(self, *others)

        def stack(values: Sequence[Tensor | None]) -> Tensor | None:
            return None if values[0] is None else torch.cat([v for v in values if v is not None])

        labels = [p.label for p in parts]

        return Condition(
            stack([p.context for p in parts]),
            stack([p.mask for p in parts]),
            stack([p.vector for p in parts]),
            stack([p.concat for p in parts]),
            tuple(torch.cat(h) for h in zip(*(p.hint for p in parts), strict=True)),
            None if any(label is None for label in labels) else stack(labels),
        )


def align_fields(*parts: Condition) -> list[Condition]:
    """Give conditions the same shapes, so that their rows can be mixed.

    Contexts are padded to the longest; masks are added if lengths differ or any condition has one; concats and hints
    of a single position are expanded.
    Raises ValueError if the fields in use differ.
    """
    used = [
        tuple(bool(v) if isinstance(v, tuple) else v is not None for v in (p.context, p.vector, p.concat, p.hint))
        for p in parts
    ]
    if len(set(used)) > 1:
        raise ValueError(
            f"conditions with different fields cannot be joined (context, vector, concat, hint in use: {used})"
        )
    hints = (
        zip(*(expand_spatial(column) for column in zip(*(p.hint for p in parts), strict=True)), strict=True)
        if parts[0].hint
        else [()] * len(parts)
    )
    concats = expand_spatial([p.concat for p in parts])
    parts = tuple(
        replace(p, concat=concat, hint=tuple(hint)) for p, concat, hint in zip(parts, concats, hints, strict=True)
    )
    lengths = {p.context.shape[1] for p in parts if p.context is not None}
    if not lengths or (len(lengths) == 1 and all(p.mask is None for p in parts)):
        return list(parts)
    return [pad_context(p, max(lengths)) for p in parts]


def pad_context(cond: Condition, length: int) -> Condition:
    """Pad the context to `length` tokens and mask the padding."""
    if cond.context is None:
        return cond
    mask = (
        cond.mask
        if cond.mask is not None
        else torch.ones(cond.context.shape[:2], dtype=torch.bool, device=cond.context.device)
    )
    more = length - cond.context.shape[1]
    return (
        cond
        if not more and cond.mask is not None
        else replace(cond, context=pad(cond.context, (0, 0, 0, more)), mask=pad(mask, (0, more), value=False))
    )


def expand_spatial(parts: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Expand tensors (B, C, 1, ..., 1) to the size of the largest (B, C, ...)."""
    size = max((part.shape[2:] for part in parts if part is not None), key=lambda sides: sides.numel(), default=None)
    return [
        expand_sides(part, size) if part is not None and size and set(part.shape[2:]) == {1} else part for part in parts
    ]


def expand_sides(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Expand x (B, C, 1, ..., 1), with any number of ones, to (B, C, *sides)."""
    return x.reshape(*x.shape[:2], *[1] * len(sides)).expand(-1, -1, *sides)
