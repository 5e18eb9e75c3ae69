"""No condition: an unconditional model."""

from typing import Any

from torch import nn

from ldm.condition import Condition


class Unconditional(nn.Module):
    """No condition: every field is empty, also in the null condition."""

    keys = ()
    context_dim = vector_dim = None
    concat_channels = 0

    def forward(self, batch: dict[str, Any]) -> Condition:
        return Condition()

    def null(self, batch: dict[str, Any]) -> Condition:
        return Condition()
