"""Captions as the condition, encoded by a frozen text encoder with a cache of features."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.conditioner.tokens import TextEncoder
from ldm.errors import ConfigError

MAX_CACHE_VALUES = 1 << 28  # float32 values in the token table (1 GiB); when it is full it is cleared


class Text(nn.Module):
    """Captions through a frozen text encoder: batch["caption"], B texts -> context, mask, vector, float32.

    context (B, L, D) and mask (B, L): the tokens; L is the longest of the batch rounded up to a multiple of 8, at most
    max_length; a longer caption is truncated with a warning.
    vector (B, V): the text's embedding, with norm sqrt(V), about unit variance per dimension.
    The null condition is that of the empty caption.
    The encoder is frozen and is not part of this module's parameters or state.
    Raises ValueError for a max_length that the encoder does not support, and for captions that are not a list of texts.
    """

    keys = ("caption",)
    concat_channels = 0
    vector_dim: int | None
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, encoder: TextEncoder, max_length: int = 32):
        super().__init__()
        if not 2 <= max_length <= encoder.length:
            raise ConfigError(f"max_length={max_length}: expected 2 to {encoder.length} tokens, the encoder's limit")
        self.context_dim, self.vector_dim = encoder.context_dim, encoder.vector_dim
        self.cache = FeatureCache(encoder, max_length)
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        return self.cache.condition(require_texts(batch["caption"]), self.device_anchor.device)

    def null(self, batch: dict[str, Any]) -> Condition:
        return self.cache.condition([""] * num_rows(batch), self.device_anchor.device)

    def tokenize(self, prompt: str) -> list[str]:
        """Split the prompt into the pieces that the encoder reads."""
        return self.cache.encoder.tokenize(prompt)

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of the encoder's weights."""
        return self.cache.encoder.identity


class FeatureCache:
    """The encoder's features of all texts so far, at most `length` tokens each, in three tables.

    context (T, D): the tokens of all texts, one text after another; row 0 is zero and stands for padding.
    token_rows (N, length): for text n, the rows of `context` with its tokens.  vector (N, V).
    A plain object, not a module: nothing in it is to be trained, saved, averaged or sent between processes.
    """

    def __init__(self, encoder: TextEncoder, length: int):
        self.encoder, self.length = encoder, length
        self.clear(torch.device("cpu"))

    def clear(self, device: torch.device) -> None:
        """Drop all features and move the tables to `device`."""
        self.row: dict[str, int] = {}
        self.size: list[int] = []  # tokens of each text; a list, so that no batch waits for the device
        self.used = 1
        self.context = torch.zeros(1, self.encoder.context_dim, device=device)
        self.token_rows = torch.zeros(1, self.length, dtype=torch.int64, device=device)
        self.vector = torch.zeros(1, self.encoder.vector_dim, device=device)

    @torch.inference_mode(False)  # else tables created while sampling could not be written to in training
    @torch.no_grad()
    def condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        """Return the features of B captions, padded to a common length."""
        if device != self.context.device or self.used * self.encoder.context_dim > MAX_CACHE_VALUES:
            self.clear(device)
        for text in dict.fromkeys(captions):
            if text not in self.row:
                self.add(text)
        rows = [self.row[text] for text in captions]
        longest = max((self.size[row] for row in rows), default=1)
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        tokens = self.token_rows[index, : min(-(-longest // 8) * 8, self.length)]  # (B, L)
        return Condition(context=self.context[tokens], mask=tokens > 0, vector=self.vector[index])

    def add(self, text: str) -> None:
        """Encode one text alone, so that its features are bit-identical whichever batch or process needs it first."""
        features = self.encoder.to(self.context.device)([text], self.length)
        tokens = features.context[features.mask]  # (S, D)
        row, size = len(self.size), len(tokens)
        self.context = grow(self.context, self.used + size)
        self.token_rows, self.vector = grow(self.token_rows, row + 1), grow(self.vector, row + 1)
        self.context[self.used : self.used + size] = tokens
        self.token_rows[row, :size] = torch.arange(self.used, self.used + size)
        self.vector[row] = normalize(features.vector[0], dim=0) * self.encoder.vector_dim**0.5
        self.row[text] = row
        self.size.append(size)
        self.used += size


def grow(table: Tensor, need: int) -> Tensor:
    """Return the table with at least `need` rows: at least doubled if it is too small, padded with zeros."""
    return (
        table
        if len(table) >= need
        else torch.cat([table, table.new_zeros(max(need - len(table), len(table)), *table.shape[1:])])
    )


def require_texts(captions: Any) -> list[str]:
    """Return captions as a list. Raises ValueError if they are not a sequence of texts."""
    if isinstance(captions, str) or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"caption={captions!r:.80}: expected a list of texts, one for each image")
    return list(captions)


def nearest_caption(
    encoder: TextEncoder, prompts: Sequence[str], captions_by_class: Sequence[Sequence[str]]
) -> list[int]:
    """Return, for each prompt, the class with the caption nearest to it, by cosine of the encoder's vectors.

    A baseline that uses words alone.
    """
    owner = [index for index, captions in enumerate(captions_by_class) for _ in captions]
    captions = [caption for captions in captions_by_class for caption in captions]
    queries, known = (normalize(encoder(require_texts(group)).vector, dim=1) for group in (prompts, captions))
    return [owner[i] for i in (queries @ known.T).argmax(1).tolist()]


class TextTokensOnly(Text):
    """As Text, without the vector of the text, as in Stable Diffusion 1 and 2 (LDM section 3.3)."""

    def __init__(self, encoder: TextEncoder, max_length: int = 77):
        super().__init__(encoder, max_length)
        self.vector_dim = None

    def forward(self, batch: dict[str, Any]) -> Condition:
        return replace(super().forward(batch), vector=None)

    def null(self, batch: dict[str, Any]) -> Condition:
        return replace(super().null(batch), vector=None)
