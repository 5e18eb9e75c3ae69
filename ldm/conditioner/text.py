"""Captions as the condition, read by a frozen text encoder whose features are kept."""

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

MAX_CACHE_VALUES = 1 << 28  # numbers kept in the table of tokens (1 GiB); when it is full it starts anew


class Text(nn.Module):
    """batch["caption"], B texts: context (B, L, D) and mask (B, L) of their tokens, vector (B, V) of the whole text, float32.

    L is the longest of the batch rounded up to a multiple of 8, at most `length` tokens; a longer caption is cut with a warning.
    The vector has norm sqrt(V), about unit variance per dimension.  The null condition is the empty caption's.  The encoder is frozen
    and no part of this module's parameters or state.  Raises ValueError for a length that the encoder has not, and for captions that
    are not a list of texts.
    """

    keys = ("caption",)
    concat_channels = 0
    vector_dim: int | None
    device_anchor: Tensor  # empty, goes where the model goes

    def __init__(self, encoder: TextEncoder, max_length: int = 32):
        super().__init__()
        if not 2 <= max_length <= encoder.length:
            raise ConfigError(f"length={max_length}: expected 2 to {encoder.length} tokens, the encoder's limit")
        self.context_dim, self.vector_dim = encoder.context_dim, encoder.vector_dim
        self.kept = FeatureCache(encoder, max_length)
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        return self.kept.condition(require_texts(batch["caption"]), self.device_anchor.device)

    def null(self, batch: dict[str, Any]) -> Condition:
        return self.kept.condition([""] * num_rows(batch), self.device_anchor.device)

    def tokenize(self, prompt: str) -> list[str]:
        """The pieces of the prompt that the encoder reads."""
        return self.kept.encoder.tokenize(prompt)

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of the encoder's weights."""
        return self.kept.encoder.identity


class FeatureCache:
    """An encoder's features of every text so far, at most `length` tokens each, in three tables.

    context (T, D): the tokens of all texts, one after another; row 0 is zero and stands for padding.  place (N, length): text n's rows
    in it.  vector (N, V).  A plain object, not a module: nothing here is to be trained, saved, averaged or sent between processes.
    """

    def __init__(self, encoder: TextEncoder, length: int):
        self.encoder, self.length = encoder, length
        self.clear(torch.device("cpu"))

    def clear(self, device: torch.device) -> None:
        """Forget everything; go to a device."""
        self.row: dict[str, int] = {}
        self.size: list[int] = []  # of each text in tokens, here so that no batch waits for the device
        self.used = 1
        self.context = torch.zeros(1, self.encoder.context_dim, device=device)
        self.place = torch.zeros(1, self.length, dtype=torch.int64, device=device)
        self.vector = torch.zeros(1, self.encoder.vector_dim, device=device)

    @torch.inference_mode(False)  # or tables made while sampling could not be written to in training
    @torch.no_grad()
    def condition(self, captions: Sequence[str], device: torch.device) -> Condition:
        """Features of B captions, padded together."""
        if device != self.context.device or self.used * self.encoder.context_dim > MAX_CACHE_VALUES:
            self.clear(device)
        for text in dict.fromkeys(captions):
            if text not in self.row:
                self.add(text)
        rows = [self.row[text] for text in captions]
        longest = max((self.size[row] for row in rows), default=1)
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        place = self.place[index, : min(-(-longest // 8) * 8, self.length)]  # (B, L)
        return Condition(context=self.context[place], mask=place > 0, vector=self.vector[index])

    def add(self, text: str) -> None:
        """Encode one text, alone: so its features do not depend, to the last bit, on the batch or process that met it first."""
        features = self.encoder.to(self.context.device)([text], self.length)
        tokens = features.context[features.mask]  # (S, D)
        row, size = len(self.size), len(tokens)
        self.context = grow(self.context, self.used + size)
        self.place, self.vector = grow(self.place, row + 1), grow(self.vector, row + 1)
        self.context[self.used : self.used + size] = tokens
        self.place[row, :size] = torch.arange(self.used, self.used + size)
        self.vector[row] = normalize(features.vector[0], dim=0) * self.encoder.vector_dim**0.5
        self.row[text] = row
        self.size.append(size)
        self.used += size


def grow(table: Tensor, need: int) -> Tensor:
    """The table with at least `need` rows, doubled when it is too small."""
    return (
        table
        if len(table) >= need
        else torch.cat([table, table.new_zeros(max(need - len(table), len(table)), *table.shape[1:])])
    )


def require_texts(captions: Any) -> list[str]:
    """Captions as a list. Raises ValueError if they are not one of texts."""
    if isinstance(captions, str) or not all(isinstance(one, str) for one in captions):
        raise ValueError(f"caption={captions!r:.80}: expected a list of texts, one for each image")
    return list(captions)


def nearest_caption(
    encoder: TextEncoder, prompts: Sequence[str], captions_by_class: Sequence[Sequence[str]]
) -> list[int]:
    """For each prompt the class that has the nearest single caption, by cosine of the encoder's vectors: what words alone can tell."""
    owner = [index for index, captions in enumerate(captions_by_class) for _ in captions]
    captions = [caption for captions in captions_by_class for caption in captions]
    told, known = (normalize(encoder(require_texts(group)).vector, dim=1) for group in (prompts, captions))
    return [owner[i] for i in (told @ known.T).argmax(1).tolist()]


class TextTokensOnly(Text):
    """As Text, without the vector of the whole text: Stable Diffusion 1 and 2 hear no more (LDM sec. 3.3)."""

    def __init__(self, encoder: TextEncoder, max_length: int = 77):
        super().__init__(encoder, max_length)
        self.vector_dim = None

    def forward(self, batch: dict[str, Any]) -> Condition:
        return replace(super().forward(batch), vector=None)

    def null(self, batch: dict[str, Any]) -> Condition:
        return replace(super().null(batch), vector=None)
