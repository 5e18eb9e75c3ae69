"""Measured numbers as the condition, any of which may be missing."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.errors import ConfigError


class Vector(nn.Module):
    """Numbers of a sample, batch["vector"] (B, F), in their own units -> vector (B, 2F): standardised, and which exist.

    A number that is not finite is missing: it and its mark are 0, as all are in the null condition.
    mean, std: (F,), of the training data, std above 0.
    drop: probability with which, in training, a number is missing, independently for each sample and number, so that
    any part of the numbers can be a condition later; drawn from batch["noise"].
    A network adds the vector to its time embedding by net.vector_embedding: ldm.net.blocks.mlp takes any length.
    Raises ConfigError for other options, and for vectors of another length.
    """

    keys = ("vector",)
    requires: ClassVar = {"vector": "data with measured numbers, as data=moses"}
    context_dim, concat_channels = None, 0
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], drop: float = 0.0):
        super().__init__()
        if not mean or len(mean) != len(std) or min(std) <= 0:
            raise ConfigError(f"conditioner: {len(mean)} of mean, {len(std)} of std; expected as many, std above 0")
        if not 0 <= drop <= 1:
            raise ConfigError(f"conditioner.drop={drop}: expected a probability")
        self.drop, self.vector_dim = drop, 2 * len(mean)
        self.register_buffer("mean", torch.tensor(list(mean)), persistent=False)
        self.register_buffer("std", torch.tensor(list(std)), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        numbers = batch["vector"].to(self.mean)  # (B, F)
        if numbers.ndim != 2 or numbers.shape[1] != len(self.mean):
            raise ConfigError(f"vector of {tuple(numbers.shape)}: expected {len(self.mean)} numbers for each row")
        present = numbers.isfinite()
        if self.training and self.drop:
            present &= batch["noise"].uniform("drop/vector", torch.empty_like(numbers)) >= self.drop
        standard = torch.where(present, (numbers - self.mean) / self.std, 0.0)
        return Condition(vector=torch.cat([standard, present.to(standard)], 1))

    def null(self, batch: dict[str, Any]) -> Condition:
        return Condition(vector=self.mean.new_zeros(num_rows(batch), self.vector_dim))
