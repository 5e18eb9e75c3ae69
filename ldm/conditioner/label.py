"""A class label as the condition."""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.errors import ConfigError


class Label(nn.Module):
    """Class label as one learned token: batch["label"] (B,) int64 in [0, num_classes) -> context (B, 1, dim).

    A label of -1 (none) gives the null condition: a learned class of its own, row num_classes (Ho & Salimans 2022).
    Raises ConfigError for a label out of range.
    """

    keys = ("label",)
    vector_dim, concat_channels = None, 0

    def __init__(self, num_classes: int, dim: int = 64):
        super().__init__()
        self.context_dim = dim
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, batch: dict[str, Any]) -> Condition:
        return Condition(context=embed_labels(self.embedding, batch["label"])[:, None])  # (B, 1, D)

    def null(self, batch: dict[str, Any]) -> Condition:
        return Condition(context=null_embedding(self.embedding, num_rows(batch))[:, None])


class LabelVector(nn.Module):
    """As Label, but as a vector (B, dim) for the time embedding, as in DiT: for networks without cross-attention.

    Dhariwal & Nichol 2021.
    """

    keys = ("label",)
    context_dim, concat_channels = None, 0

    def __init__(self, num_classes: int, dim: int = 64):
        super().__init__()
        self.vector_dim = dim
        self.embedding = nn.Embedding(num_classes + 1, dim)

    def forward(self, batch: dict[str, Any]) -> Condition:
        return Condition(vector=embed_labels(self.embedding, batch["label"]))  # (B, D)

    def null(self, batch: dict[str, Any]) -> Condition:
        return Condition(vector=null_embedding(self.embedding, num_rows(batch)))


def embed_labels(embedding: nn.Embedding, label: Tensor) -> Tensor:
    """Look up labels (B,) in the table: (B, dim), the null class's row for -1.

    The range is checked on the CPU only, where it costs no synchronisation.
    Raises ConfigError for a label out of range.
    """
    classes = embedding.num_embeddings - 1
    if label.device.type == "cpu" and len(label) and not -1 <= int(label.min()) <= int(label.max()) < classes:
        wrong = label[(label < -1) | (label >= classes)][0]
        raise ConfigError(f"label={wrong}: expected 0 to {classes - 1}, the classes of the data, or -1 for none")
    label = torch.where(label < 0, classes, label)
    return embedding(label.to(embedding.weight.device))


def null_embedding(embedding: nn.Embedding, num: int) -> Tensor:
    """Return the null class's row repeated: (num, dim)."""
    return embedding(torch.full((num,), embedding.num_embeddings - 1, device=embedding.weight.device))
