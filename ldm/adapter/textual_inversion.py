"""Textual inversion: train the embeddings of one new word of a text encoder and nothing else (Gal et al. 2023)."""

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
    """The adapter of one word, in the vocabulary or not.

    placeholder_token: the word in captions; it has one vector for each token into which the encoder splits it.
    initializer_token: a word whose mean vector initialises them; null: the placeholder's own vectors.
    Raises ConfigError for a conditioner that is not a single text encoder.
    """

    placeholder_token: str
    initializer_token: str | None = None

    def apply_to(self, model: Any, scale: float = 1.0) -> None:
        """Replace the word's embeddings in a model's conditioner; freeze everything else.

        scale: 0 gives the initial vectors, 1 the trained ones.
        """
        model.requires_grad_(False)
        encoder = getattr(getattr(model.conditioner, "cache", None), "encoder", None)
        if not hasattr(encoder, "features"):
            raise ConfigError("adapter=textual_inversion: expected a model whose only conditioner is minilm or clip")
        model.conditioner = TokenEmbeddingOverride(
            model.conditioner, self.placeholder_token, self.initializer_token, scale
        )


class TokenEmbeddingOverride(nn.Module):
    """A text conditioner with trained embeddings for one word; captions without the word are encoded as before.

    conditioner: one with `cache`, whose encoder has token_ids(word), embedding and features; or another
    TokenEmbeddingOverride.
    placeholder_token, initializer_token, scale: as in TextualInversion.
    """

    concat_channels = 0
    began: Tensor

    def __init__(
        self, conditioner: Any, placeholder_token: str, initializer_token: str | None = None, scale: float = 1.0
    ):
        super().__init__()
        self.told, self.scale = conditioner, scale  # `told` is a prefix in checkpoints
        self.words = (*getattr(conditioner, "words", ()), placeholder_token.lower())
        self.keys, self.context_dim, self.vector_dim, self.cache = (
            conditioner.keys,
            conditioner.context_dim,
            conditioner.vector_dim,
            conditioner.cache,
        )
        self.token_ids = self.cache.encoder.token_ids(placeholder_token)
        table = self.cache.encoder.embedding.weight.detach()
        initial = (
            table[self.token_ids]
            if initializer_token is None
            else table[self.cache.encoder.token_ids(initializer_token)].mean(0).expand(len(self.token_ids), -1)
        )
        self.register_buffer("began", initial.clone(), persistent=False)
        self.vectors = nn.Parameter(initial.clone())

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
        """Add the vectors, times 0, to the condition while training.

        In a batch without the word their gradient is then 0 instead of None.
        """
        if not self.training or cond.context is None:
            return cond
        return replace(cond, context=cond.context + 0 * self.vectors.sum())

    def null(self, batch: dict[str, Any]) -> Condition:
        return self.told.null(batch)

    def tokenize(self, prompt: str) -> list[str]:
        """Return the tokens of the prompt that the encoder reads."""
        return self.told.tokenize(prompt)

    @contextmanager
    def embeddings_replaced(self, embedding: nn.Module) -> Iterator[None]:
        """Make `embedding` return the trained vectors, of this word and of wrapped overrides, within the block."""
        vectors = self.began + self.scale * (self.vectors - self.began)

        def substitute(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return replace_embeddings(out, args[0], self.token_ids, vectors)

        hook = embedding.register_forward_hook(substitute)
        try:
            with (
                self.told.embeddings_replaced(embedding) if hasattr(self.told, "embeddings_replaced") else nullcontext()
            ):
                yield
        finally:
            hook.remove()


def replace_embeddings(embedded: Tensor, ids: Tensor, token_ids: Sequence[int], vectors: Tensor) -> Tensor:
    """Replace embeddings (B, L, D) of ids (B, L) by vectors (P, D) where the ids contain the sequence token_ids."""
    pattern = torch.tensor(token_ids, device=ids.device)
    n = len(token_ids)
    matches = (ids.unfold(1, n, 1) == pattern).all(-1) if ids.shape[1] >= n else ids[:, :0].bool()
    embedded = embedded.clone()
    for row, start in matches.nonzero().tolist():
        embedded[row, start : start + n] = vectors.to(embedded)
    return embedded
