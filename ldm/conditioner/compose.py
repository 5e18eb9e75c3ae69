"""Several conditions at once, and the one place where conditions are dropped in training."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.condition import Condition, expand_spatial
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise


class Compose(nn.Module):
    """The conditions of all its conditioners, joined field by field; the null is that of the nulls.

    Contexts follow one another along L, in the widest's dimension, to which a learned linear map takes the others; vectors are joined
    along D, concat along C.  A conditioner of whose keys a batch lacks one gives its null.
    drop: conditioner -> the probability with which, while training, a row's condition by it gives way to its null, one by one; drawn from
    batch["noise"].  Raises ConfigError without any conditioner, and for a rate that is none or of no conditioner.
    """

    needs = ()  # keys without which it is the null: none, as each of its conditioners sees to its own

    def __init__(self, drop: Mapping[str, float] | None = None, **conditioners: nn.Module):
        super().__init__()
        if not conditioners:
            raise ConfigError("a composed conditioner needs at least one conditioner, name=conditioner")
        self.drop = dict(drop or {})
        for name, rate in self.drop.items():
            if name not in conditioners:
                raise ConfigError(f"drop.{name}={rate}: expected a rate for one of {', '.join(conditioners)}")
            if not 0 <= rate <= 1:
                raise ConfigError(f"drop.{name}={rate}: expected a probability")
        self.conditioners = nn.ModuleDict(conditioners)
        parts: list[Any] = list(conditioners.values())
        self.keys = tuple(dict.fromkeys(key for part in parts for key in part.keys))
        self.context_dim = max((part.context_dim for part in parts if part.context_dim), default=None)
        self.vector_dim = sum(part.vector_dim or 0 for part in parts) or None
        self.concat_channels = sum(part.concat_channels for part in parts)
        dims = {name: part.context_dim for name, part in zip(conditioners, parts, strict=True)}
        widest = self.context_dim or 0
        narrow = {name: dim for name, dim in dims.items() if dim and dim < widest}
        self.widen = nn.ModuleDict({name: nn.Linear(dim, widest) for name, dim in narrow.items()})

    def forward(self, batch: dict[str, Any]) -> Condition:
        return self._join({name: self._told(name, part, batch) for name, part in self.conditioners.items()})

    def null(self, batch: dict[str, Any]) -> Condition:
        return self._join({name: cast(Any, part).null(batch) for name, part in self.conditioners.items()})

    def _told(self, name: str, part: nn.Module, batch: dict[str, Any]) -> Condition:
        cond, rate = condition_or_null(part, batch), self.drop.get(name, 0.0) if self.training else 0.0
        return drop_condition(cond, cast(Any, part).null(batch), batch["noise"], f"drop/{name}", rate) if rate else cond

    def _join(self, conds: dict[str, Condition]) -> Condition:
        contexts = {name: cond.context for name, cond in conds.items() if cond.context is not None}
        masks = {name: conds[name].mask for name in contexts}
        if any(mask is not None for mask in masks.values()):
            masks = {name: full_mask(contexts[name]) if mask is None else mask for name, mask in masks.items()}
        return Condition(
            context=concat_present(
                [self.widen[name](c) if name in self.widen else c for name, c in contexts.items()]
            ),  # (B, L1 + L2 + ..., D)
            mask=concat_present(masks.values()),
            vector=concat_present([cond.vector for cond in conds.values()]),
            concat=concat_present(expand_spatial([cond.concat for cond in conds.values()])),
            hint=tuple(hint for cond in conds.values() for hint in cond.hint),
        )


def condition_or_null(conditioner: Any, batch: dict[str, Any]) -> Condition:
    """The conditioner's Condition of a batch; its null where the batch lacks one of its keys, or of those it `needs` if it says so."""
    return (
        conditioner(batch)
        if all(key in batch for key in getattr(conditioner, "needs", conditioner.keys))
        else conditioner.null(batch)
    )


def drop_condition(cond: Condition, null: Condition, noise: KeyedNoise, purpose: str, rate: float) -> Condition:
    """cond, row by row the null with probability `rate` (Ho & Salimans 2022, algorithm 1); which rows is noise's to say."""
    return cond.where(noise.uniform(purpose, torch.empty(len(noise))) >= rate, null)


def concat_present(parts: Iterable[Tensor | None]) -> Tensor | None:
    """The parts that are there, one after another along axis 1; None without any."""
    there = [part for part in parts if part is not None]
    return torch.cat(there, 1) if there else None


def full_mask(context: Tensor) -> Tensor:
    """The mask (B, L) of a context all of whose tokens are real."""
    return torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
