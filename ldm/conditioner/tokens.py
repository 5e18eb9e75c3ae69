"""What all text encoders share: their interface, and the truncation of long prompts with a warning."""

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

log = logging.getLogger(__name__)


class TextFeatures(NamedTuple):
    """Features of B texts.

    context: (B, L, D), one vector per token.  mask: (B, L) bool, True for tokens to attend to.
    vector: (B, V), one per text.
    """

    context: Tensor
    mask: Tensor
    vector: Tensor


class TextEncoder(Protocol):
    """A frozen text encoder.

    length: maximum number of tokens of a text, including start and end tokens.  identity: SHA-256 of its weights.
    For training.text_features=disk it also has a `fingerprint`, a text that changes with whatever changes its features:
    weights, architecture, tokenizer, options.
    """

    context_dim: int
    vector_dim: int
    length: int
    identity: str

    def __call__(self, texts: Sequence[str], length: int | None = None) -> TextFeatures: ...
    def tokenize(self, text: str) -> list[str]: ...
    def to(self, device) -> "TextEncoder": ...


class Truncation:
    """Truncates token ids and counts what it drops; warns for the first ten texts, then whenever the count has doubled.

    texts, dropped: number of texts truncated so far, and of tokens dropped.
    """

    def __init__(self):
        self.texts, self.dropped = 0, 0

    def __call__(self, text: str, ids: Sequence[int], length: int) -> list[int]:
        """Return the first length - 1 ids and the last one, which is the end token; all of them if they fit."""
        if (excess := len(ids) - length) <= 0:
            return list(ids)
        self.texts, self.dropped = self.texts + 1, self.dropped + excess
        if self.texts <= 10 or self.texts & (self.texts - 1) == 0:
            total = f"; {self.texts} texts cut so far, {self.dropped} tokens dropped" if self.texts > 1 else ""
            log.warning(
                "text of %d tokens cut to %d, %d tokens dropped: %.60r%s", len(ids), length, excess, text, total
            )
        return [*ids[: length - 1], ids[-1]]
