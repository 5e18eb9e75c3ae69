"""What every text encoder shares: its interface, and prompts cut to a length that are counted and told."""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

log = logging.getLogger(__name__)


class TextFeatures(NamedTuple):
    """What an encoder says of B texts: context (B, L, D) per token, mask (B, L) bool with True = to be read, vector (B, V) of the whole."""

    context: Tensor
    mask: Tensor
    vector: Tensor


class TextEncoder(Protocol):
    """A frozen text encoder; length: the most tokens of a text, marks of start and end included.  identity: SHA-256 of its weights."""

    context_dim: int
    vector_dim: int
    length: int
    identity: str

    def __call__(self, texts: Sequence[str], length: int | None = None) -> TextFeatures: ...
    def tokenize(self, text: str) -> list[str]: ...
    def to(self, device) -> "TextEncoder": ...


class Truncation:
    """Cuts token ids and counts what it drops; warns of the first ten texts, then at every doubling.

    texts, dropped: how many texts were cut so far, and how many tokens that cost.
    """

    def __init__(self):
        self.texts, self.dropped = 0, 0

    def __call__(self, text: str, ids: Sequence[int], length: int) -> list[int]:
        """The first length - 1 ids and the last one, which marks the end."""
        if (excess := len(ids) - length) <= 0:
            return list(ids)
        self.texts, self.dropped = self.texts + 1, self.dropped + excess
        if self.texts <= 10 or self.texts & (self.texts - 1) == 0:
            total = f"; {self.texts} texts cut so far, {self.dropped} tokens dropped" if self.texts > 1 else ""
            log.warning(
                "text of %d tokens cut to %d, %d tokens dropped: %.60r%s", len(ids), length, excess, text, total
            )
        return [*ids[: length - 1], ids[-1]]
