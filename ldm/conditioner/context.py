"""Text of which the network hears the tokens alone."""

from dataclasses import replace
from typing import Any

from ldm.condition import Condition
from ldm.conditioner.text import Text
from ldm.conditioner.tokens import Encoder


class ContextOnly(Text):
    """As Text, without the vector of the whole text: Stable Diffusion 1 and 2 hear no more (LDM sec. 3.3)."""

    def __init__(self, encoder: Encoder, length: int = 77):
        super().__init__(encoder, length)
        self.vector_dim = None

    def forward(self, batch: dict[str, Any]) -> Condition:
        return replace(super().forward(batch), vector=None)

    def null(self, batch: dict[str, Any]) -> Condition:
        return replace(super().null(batch), vector=None)
