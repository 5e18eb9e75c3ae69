"""Captions as the condition, encoded by a frozen text encoder."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.condition import Condition
from ldm.conditioner.features import CaptionFeatures, FeatureCache
from ldm.conditioner.rows import num_rows
from ldm.conditioner.tokens import TextEncoder
from ldm.errors import ConfigError


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
        self.cache: CaptionFeatures = FeatureCache(encoder, max_length)  # training.text_features may replace it
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
