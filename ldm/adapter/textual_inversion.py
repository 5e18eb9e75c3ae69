"""Textual inversion: a word that nobody knew gets its vectors, and all else stays as it is (Gal et al. 2023)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ldm.condition import Condition
from ldm.errors import ConfigError


@dataclass(frozen=True)
class TextualInversion:
    """The adapter of one word, made up or not, as a text encoder reads it.

    word: as captions have it; it has as many vectors as the encoder makes pieces of it.  like: a word whose vectors it begins with, the
    mean of them; null: its own.  Raises ConfigError for a conditioner without a text encoder of its own.
    """

    placeholder_token: str
    initializer_token: str | None = None

    def apply_to(self, model: Any, scale: float = 1.0) -> None:
        """Let a model's conditioner hear the word's own vectors, `scale` of the way from where they began, all else frozen."""
        model.requires_grad_(False)
        encoder = getattr(getattr(model.conditioner, "cache", None), "encoder", None)
        if not hasattr(encoder, "features"):
            raise ConfigError("adapter=textual_inversion: expected a model that is told by minilm or clip alone")
        model.conditioner = TokenEmbeddingOverride(
            model.conditioner, self.placeholder_token, self.initializer_token, scale
        )


class TokenEmbeddingOverride(nn.Module):
    """A text conditioner that hears one word as it was learnt; captions without it are read as before.

    told: a conditioner with `cache`, whose encoder has pieces(word), embedding and features; or another Inverted.
    """

    concat_channels = 0
    began: Tensor

    def __init__(self, told: Any, word: str, like: str | None = None, scale: float = 1.0):
        super().__init__()
        self.told, self.scale = told, scale
        self.words = (*getattr(told, "words", ()), word.lower())
        self.keys, self.context_dim, self.vector_dim, self.cache = (
            told.keys,
            told.context_dim,
            told.vector_dim,
            told.cache,
        )
        self.token_ids = self.cache.encoder.token_ids(word)
        table = self.cache.encoder.embedding.weight.detach()
        began = (
            table[self.token_ids]
            if like is None
            else table[self.cache.encoder.token_ids(like)].mean(0).expand(len(self.token_ids), -1)
        )
        self.register_buffer("began", began.clone(), persistent=False)
        self.vectors = nn.Parameter(began.clone())

    def forward(self, batch: dict[str, Any]) -> Condition:
        captions = list(batch["caption"])
        if not any(word in caption.lower() for caption in captions for word in self.words):
            return self.keep_in_graph(self.told(batch))
        encoder = self.cache.encoder.to(self.vectors.device)
        with self.embeddings_replaced(encoder.embedding):
            features = encoder.features(captions, self.cache.length)
        vector = None if self.vector_dim is None else normalize(features.vector, dim=1) * self.vector_dim**0.5
        return self.keep_in_graph(Condition(context=features.context, mask=features.mask, vector=vector))

    def keep_in_graph(self, cond: Condition) -> Condition:
        """The condition with the vectors in its graph, while training: of a batch without the word their gradient is 0, not absent."""
        if not self.training or cond.context is None:
            return cond
        return replace(cond, context=cond.context + 0 * self.vectors.sum())

    def null(self, batch: dict[str, Any]) -> Condition:
        return self.told.null(batch)

    def tokenize(self, prompt: str) -> list[str]:
        """The pieces of the prompt that the encoder reads."""
        return self.told.tokenize(prompt)

    @contextmanager
    def embeddings_replaced(self, embedding: nn.Module) -> Iterator[None]:
        """Within it the embedding of ids gives the pieces of the word, and of those learned before, their vectors."""
        vectors = self.began + self.scale * (self.vectors - self.began)

        def hear(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return replace_embeddings(out, args[0], self.token_ids, vectors)

        hook = embedding.register_forward_hook(hear)
        try:
            with (
                self.told.embeddings_replaced(embedding) if hasattr(self.told, "embeddings_replaced") else nullcontext()
            ):
                yield
        finally:
            hook.remove()


def replace_embeddings(embedded: Tensor, ids: Tensor, pieces: Sequence[int], vectors: Tensor) -> Tensor:
    """embedded (B, L, D) of ids (B, L), with vectors (P, D) wherever the ids are `pieces` (P,) one after another."""
    wanted = torch.tensor(pieces, device=ids.device)
    places = (ids.unfold(1, len(pieces), 1) == wanted).all(-1) if ids.shape[1] >= len(pieces) else ids[:, :0].bool()
    embedded = embedded.clone()
    for row, place in places.nonzero().tolist():
        embedded[row, place : place + len(pieces)] = vectors.to(embedded)
    return embedded
