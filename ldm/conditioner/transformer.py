"""LDM's own token transformer, trained with the denoiser (Rombach et al. 2022, app. E.2.1): captions and layouts."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.conditioner.text import require_texts
from ldm.conditioner.tokens import Truncation
from ldm.errors import ConfigError
from ldm.io.download import AssetNotFoundError, minilm

log = logging.getLogger(__name__)


class Attention(nn.Module):
    """Self-attention x (B, L, D) -> (B, L, D) over all tokens, including padding; q, k, v without bias."""

    def __init__(self, dim: int, heads: int, head_channels: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, heads * head_channels, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head_channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )  # (B, H, L, D/H)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One pre-norm encoder layer: x (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, heads: int, head_channels: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads, head_channels)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Token and position embeddings, pre-norm layers and a final norm: ids (B, L) int64 -> (B, L, dim).

    tokens: size of the vocabulary.  length: maximum number of tokens.
    logits: whether to include the unused output head over the vocabulary that LDM's published weights contain.
    """

    def __init__(
        self,
        tokens: int,
        length: int,
        dim: int,
        layers: int,
        heads: int = 8,
        head_channels: int = 64,
        logits: bool = False,
    ):
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, dim), nn.Embedding(length, dim)
        self.layers = nn.ModuleList(Layer(dim, heads, head_channels) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.logits = nn.Linear(dim, tokens) if logits else None
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position.weight[: ids.shape[1]]  # (B, L, D)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class WordPiece(nn.Module):
    """Captions through a transformer trained with the denoiser.

    batch["caption"], B texts -> context (B, max_length, dim).
    The texts are tokenised as BERT's word pieces and padded to max_length with a token that is read like any other; a
    longer text is truncated with a warning. The null condition is that of the empty text.
    vocabulary: a tokenizer.json; None is BERT's uncased list of 30,522, a local copy or downloaded.
    Raises AssetNotFoundError without it.
    """

    keys = ("caption",)
    vector_dim, concat_channels = None, 0

    def __init__(
        self,
        dim: int = 1280,
        layers: int = 32,
        num_heads: int = 8,
        num_head_channels: int = 64,
        max_length: int = 77,
        keep_logits_head: bool = False,
        vocabulary: str | None = None,
    ):
        from tokenizers import Tokenizer

        super().__init__()
        file = Path(vocabulary).expanduser() if vocabulary else minilm() / "tokenizer.json"
        if not file.is_file():
            raise AssetNotFoundError(
                f"vocabulary={vocabulary}: no such file; expected a tokenizer.json, or null for BERT's own list"
            )
        self.tokenizer, self.truncation = Tokenizer.from_file(str(file)), Truncation()
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.length, self.context_dim = max_length, dim
        self.transformer = Transformer(
            self.tokenizer.get_vocab_size(), max_length, dim, layers, num_heads, num_head_channels, keep_logits_head
        )
        self.ids = lru_cache(maxsize=1 << 20)(self._ids)

    def forward(self, batch: dict[str, Any]) -> Condition:
        return self.encode(require_texts(batch["caption"]))

    def null(self, batch: dict[str, Any]) -> Condition:
        return self.encode([""] * num_rows(batch))

    def encode(self, captions: Sequence[str]) -> Condition:
        """Tokenise and encode B captions."""
        ids = torch.tensor([self.ids(text) for text in captions], device=self.transformer.norm.weight.device)
        return Condition(context=self.transformer(ids))

    def tokenize(self, prompt: str) -> list[str]:
        """Split the prompt into the pieces that become tokens, as they stand in it."""
        return [prompt[start:end] for start, end in self.tokenizer.encode(prompt, add_special_tokens=False).offsets]

    def _ids(self, text: str) -> tuple[int, ...]:
        ids = self.truncation(text, self.tokenizer.encode(text).ids, self.length)
        return (*ids, *[0] * (self.length - len(ids)))  # 0 is [PAD]


class Layout(nn.Module):
    """Bounding boxes through a transformer: batch["boxes"] -> context (B, 3 max_objects + 2, dim) (LDM app. D.1 and G).

    boxes: for each of B images, rows (class, left, top, right, bottom), coordinates as fractions of width and height in
    [0, 1] from the top left. Each box is three tokens: its class and the positions of two corners on a grid of
    isqrt(num_tokens)^2; the last two tokens are the crop, the full image. Boxes past max_objects are dropped with a
    warning. The null has no box.
    Raises ConfigError for a class or a coordinate out of range.
    """

    keys = ("boxes",)
    vector_dim, concat_channels = None, 0

    def __init__(
        self,
        num_tokens: int = 8192,
        max_objects: int = 30,
        dim: int = 512,
        layers: int = 16,
        num_heads: int = 8,
        num_head_channels: int = 64,
        keep_logits_head: bool = False,
    ):
        super().__init__()
        self.none, self.objects, self.context_dim = num_tokens - 1, max_objects, dim
        self.sections = int(num_tokens**0.5)
        self.transformer = Transformer(
            num_tokens, 3 * max_objects + 2, dim, layers, num_heads, num_head_channels, keep_logits_head
        )

    def forward(self, batch: dict[str, Any]) -> Condition:
        ids = [self.ids([[float(x) for x in box] for box in boxes]) for boxes in batch["boxes"]]
        return Condition(context=self.transformer(torch.tensor(ids, device=self.transformer.norm.weight.device)))

    def null(self, batch: dict[str, Any]) -> Condition:
        return self({"boxes": [[]] * num_rows(batch)})

    def ids(self, boxes: Sequence[Sequence[float]]) -> list[int]:
        """Return the tokens of one layout."""
        if len(boxes) > self.objects:
            log.warning(
                "layout of %d boxes cut to %d, %d boxes dropped", len(boxes), self.objects, len(boxes) - self.objects
            )
        tokens = []
        for box in boxes[: self.objects]:
            if len(box) != 5 or not (0 <= box[0] < self.none and box[0] == int(box[0])):
                raise ConfigError(
                    f"box {list(box)}: expected (class, left, top, right, bottom), a class from 0 to {self.none - 1}"
                )
            tokens += [int(box[0]), self.position_token(box[1], box[2]), self.position_token(box[3], box[4])]
        crop = [self.position_token(0.0, 0.0), self.position_token(1.0, 1.0)]
        return tokens + [self.none] * (3 * self.objects - len(tokens)) + crop

    def position_token(self, x: float, y: float) -> int:
        """Return the token of a position, x and y in [0, 1]."""
        if not (0 <= x <= 1 and 0 <= y <= 1):
            raise ConfigError(f"corner ({x:g}, {y:g}) of a box: expected fractions of width and height in [0, 1]")
        column, row = round(x * (self.sections - 1)), round(y * (self.sections - 1))
        return row * self.sections + column
