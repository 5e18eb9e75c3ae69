"""Combine several conditioners, and drop conditions in training."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.condition import Condition, expand_spatial
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise


class Compose(nn.Module):
    """Several conditioners, whose conditions are joined field by field; the null condition joins their nulls.

    Contexts are concatenated along L, in the dimension of the widest; a learned linear map takes the others to it.
    Vectors are concatenated along D, concat along C. A conditioner gives its null if the batch lacks one of its keys.
    drop: conditioner name -> probability with which, in training, it is replaced by its null, independently for each
    sample and conditioner; drawn from batch["noise"].
    Raises ConfigError if there are no conditioners, and for a rate outside [0, 1] or of an unknown conditioner.
    """

    needs = ()  # no key is required: each conditioner gives its own null

    def __init__(self, drop: Mapping[str, float] | None = None, **conditioners: nn.Module):
        super().__init__()
        if not conditioners:
            raise ConfigError("a composed conditioner needs at least one conditioner, name=conditioner")
        self.drop = dict(drop or {})
        for name, rate in self.drop.items():
            if name not in conditioners:
                raise ConfigError(
                    f"conditioner.drop.{name}={rate}: expected a rate for one of {', '.join(conditioners)}"
                )
            if not 0 <= rate <= 1:
                raise ConfigError(f"conditioner.drop.{name}={rate}: expected a probability")
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
        return self._join({name: self._condition(name, part, batch) for name, part in self.conditioners.items()})

    def null(self, batch: dict[str, Any]) -> Condition:
        return self._join({name: cast(Any, part).null(batch) for name, part in self.conditioners.items()})

    def _condition(self, name: str, part: nn.Module, batch: dict[str, Any]) -> Condition:
        """Return one conditioner's condition, with its dropout in training."""
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
    """Return the conditioner's condition, or its null if the batch lacks one of its `needs` (by default its `keys`)."""
    return (
        conditioner(batch)
        if all(key in batch for key in getattr(conditioner, "needs", conditioner.keys))
        else conditioner.null(batch)
    )


def drop_condition(cond: Condition, null: Condition, noise: KeyedNoise, purpose: str, rate: float) -> Condition:
    """Replace each sample's condition by `null` with probability `rate` (Ho & Salimans 2022, algorithm 1).

    cond, null: conditions of B samples.  purpose: key of the random draw, so that several dropouts are independent.
    Which samples are dropped depends only on `noise` (seed, epoch, sample index), not on batch size or rank.
    """
    return cond.where(noise.uniform(purpose, torch.empty(len(noise))) >= rate, null)


def concat_present(parts: Iterable[Tensor | None]) -> Tensor | None:
    """Concatenate the parts that are not None along axis 1; return None if all are."""
    present = [part for part in parts if part is not None]
    return torch.cat(present, 1) if present else None


def full_mask(context: Tensor) -> Tensor:
    """Return the mask (B, L) of a context (B, L, D) without padding: True everywhere."""
    return torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
