"""all-MiniLM-L6-v2, a frozen sentence encoder (Wang et al. 2020; Reimers & Gurevych 2019), in plain torch."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from ldm.conditioner.tokens import TextFeatures, Truncation
from ldm.errors import UserError
from ldm.io.download import MINILM, AssetNotFoundError, minilm, sha256

EMBEDDING_NAMES = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "segment": "token_type_embeddings",
    "norm": "LayerNorm",
}
LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
# pooler: the head for next-sentence prediction
IGNORED_KEYS = {
    "embeddings.position_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
}


def published_name(name: str) -> str:
    """Return the published name of a parameter of Bert."""
    *layer, module, kind = name.split(".")
    return (
        f"encoder.layer.{layer[1]}.{LAYER_NAMES[module]}.{kind}"
        if layer
        else f"embeddings.{EMBEDDING_NAMES[module]}.{kind}"
    )


class Layer(nn.Module):
    """One post-norm encoder layer: x (B, L, D), mask (B, 1, 1, L) -> (B, L, D).

    Vaswani et al. 2017, section 3.1; Devlin et al. 2019.
    """

    def __init__(self, dim: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-12) for _ in range(2))
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )  # (B, H, L, D/H)
        x = self.norm1(x + self.out(scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(gelu(self.up(x))))


class Bert(nn.Module):
    """BERT's encoder for one segment (Devlin et al. 2019).

    ids (B, L) int64, mask (B, L) bool -> last hidden state (B, L, dim).
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        positions: int = 512,
        dim: int = 384,
        heads: int = 12,
        hidden: int = 1536,
        layers: int = 6,
    ):
        super().__init__()
        self.word, self.position, self.segment = (nn.Embedding(n, dim) for n in (vocabulary, positions, 2))
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList(Layer(dim, heads, hidden) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.word(ids) + self.position.weight[: ids.shape[1]] + self.segment.weight[0])  # (B, L, D)
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return x


class MiniLM(nn.Module):
    """Frozen MiniLM sentence encoder: B texts -> TextFeatures, float32, without gradient.

    context: last hidden state (B, L, 384).  mask: (B, L).  vector: mean over the real tokens (B, 384).
    path: a folder with model.safetensors and tokenizer.json; None: a local copy is searched for, else downloaded.
    Raises AssetNotFoundError without these files, ValueError if the weights belong to another model.
    """

    context_dim = vector_dim = 384
    length = 256  # the limit of its training as a sentence encoder; its position table has 512 rows

    def __init__(self, path: str | Path | None = None):
        from tokenizers import Tokenizer

        super().__init__()
        folder = minilm() if path is None else Path(path).expanduser()
        self.weights, words = folder / "model.safetensors", folder / "tokenizer.json"
        if absent := [file.name for file in (self.weights, words) if not file.is_file()]:
            raise AssetNotFoundError(
                f"MiniLM's {' and '.join(absent)} not in {folder}; path=null finds or fetches them"
            )
        self.known = MINILM["model.safetensors"] if path is None else None
        self.tokenizer = Tokenizer.from_file(str(words))
        self.tokenizer.no_padding()  # the file's own settings pad and truncate every text to 128 tokens
        self.tokenizer.no_truncation()
        self.truncation = Truncation()
        with torch.device("meta"):  # saves the time for random numbers
            self.bert = Bert()
        self._load()
        self.eval().requires_grad_(False)

    def _load(self) -> None:
        from safetensors.torch import load_file

        state, published = load_file(self.weights), {name: published_name(name) for name in self.bert.state_dict()}
        if wrong := ({*published.values()} ^ {*state}) - IGNORED_KEYS:
            raise UserError(f"{self.weights} is not all-MiniLM-L6-v2: {len(wrong)} names differ, such as {min(wrong)}")
        try:
            self.bert.load_state_dict({ours: state[name].float() for ours, name in published.items()}, assign=True)
        except RuntimeError as error:
            raise UserError(f"{self.weights} is not all-MiniLM-L6-v2: {' '.join(str(error).split())}") from error

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of the weights file."""
        return self.known or sha256(self.weights)

    @property
    def fingerprint(self) -> str:
        """All that decides the features: class, weights and tokenizer."""
        return f"{type(self).__name__} {self.identity} {self.tokenizer.to_str()}"

    def tokenize(self, text: str) -> list[str]:
        """Split the text into the pieces that become tokens, as they stand in the text."""
        return [text[start:end] for start, end in self.tokenizer.encode(text, add_special_tokens=False).offsets]

    @property
    def embedding(self) -> nn.Embedding:
        """The table that maps ids (B, L) to vectors."""
        return self.bert.word

    def token_ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without start and end tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @torch.no_grad()
    def forward(self, texts: Sequence[str], length: int | None = None) -> TextFeatures:
        return self.features(texts, length)

    def features(self, texts: Sequence[str], length: int | None = None) -> TextFeatures:
        """Encode texts as `forward` does, but with gradients."""
        limit = min(length or self.length, self.length)
        cut = [
            self.truncation(t, e.ids, limit)
            for t, e in zip(texts, self.tokenizer.encode_batch(list(texts)), strict=True)
        ]
        device = self.bert.norm.weight.device
        size = torch.tensor([len(ids) for ids in cut])
        ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in cut], batch_first=True).to(device)  # (B, L)
        mask = (torch.arange(ids.shape[1]) < size[:, None]).to(device)  # (B, L)
        # in float32, so that the features do not depend on the precision in which the network is trained
        with torch.autocast(device.type, enabled=False):
            context = self.bert(ids, mask)  # (B, L, D)
        real = mask[..., None]
        return TextFeatures(context, mask, (context * real).sum(1) / real.sum(1))
