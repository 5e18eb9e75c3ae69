"""Several conditions at once."""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.condition import Condition


class Compose(nn.Module):
    """The conditions of all its conditioners, joined field by field; the null is that of the nulls.

    Contexts follow one another along L, in the widest's dimension, to which a learned linear map takes the others; vectors are joined
    along D, concat along C.  Raises ValueError without any conditioner.
    """

    def __init__(self, **conditioners: nn.Module):
        super().__init__()
        if not conditioners:
            raise ValueError("a composed conditioner needs at least one conditioner, name=conditioner")
        self.conditioners = nn.ModuleDict(conditioners)
        parts: list[Any] = list(conditioners.values())
        self.keys = tuple(dict.fromkeys(key for part in parts for key in part.keys))
        self.context_dim = max((part.context_dim for part in parts if part.context_dim), default=None)
        self.vector_dim = sum(part.vector_dim or 0 for part in parts) or None
        dims = {name: part.context_dim for name, part in zip(conditioners, parts, strict=True)}
        widest = self.context_dim or 0
        narrow = {name: dim for name, dim in dims.items() if dim and dim < widest}
        self.widen = nn.ModuleDict({name: nn.Linear(dim, widest) for name, dim in narrow.items()})

    def forward(self, batch: dict[str, Any]) -> Condition:
        return self._join({name: part(batch) for name, part in self.conditioners.items()})

    def null(self, batch: dict[str, Any]) -> Condition:
        return self._join({name: cast(Any, part).null(batch) for name, part in self.conditioners.items()})

    def _join(self, conds: dict[str, Condition]) -> Condition:
        contexts = {name: cond.context for name, cond in conds.items() if cond.context is not None}
        masks = {name: conds[name].mask for name in contexts}
        if any(mask is not None for mask in masks.values()):
            masks = {name: real(contexts[name]) if mask is None else mask for name, mask in masks.items()}
        return Condition(
            context=joined([self.widen[name](c) if name in self.widen else c for name, c in contexts.items()]),  # (B, L1 + L2 + ..., D)
            mask=joined(masks.values()),
            vector=joined([cond.vector for cond in conds.values()]),
            concat=joined([cond.concat for cond in conds.values()]),
            hint=tuple(hint for cond in conds.values() for hint in cond.hint),
        )


def joined(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The parts that are there, one after another along axis 1; None without any."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, 1) if there else None


def real(context: Tensor) -> Tensor:
    """The mask (B, L) of a context all of whose tokens are real."""
    return torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
