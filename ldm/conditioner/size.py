"""Size and crop as the condition, SDXL's micro-conditioning (Podell et al. 2023, section 2.2)."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows

SIZE_KEYS = ("original_size", "crop", "target_size")  # of the batch: (B, 2) int64 each, height or top first, in pixels


class SizeCrop(nn.Module):
    """Size of the original image, corner of its crop, and size of the training image: vector (B, 6 dim).

    Each of the six integers of SIZE_KEYS, in this order, is embedded in `dim` numbers; the network's own MLP maps the
    vector, in conditioner=[clip,size_crop] together with the pooled text before it, to the time embedding.
    embedding: (numbers (N,) float32, dim) -> (N, dim).
    Guidance and dropout leave the sizes as they are, as in SDXL: the null of a batch with SIZE_KEYS is its condition.
    Without them it is zero.
    """

    keys = SIZE_KEYS
    requires: ClassVar = dict.fromkeys(SIZE_KEYS, "augmentation=random_crop")
    context_dim, concat_channels = None, 0
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(self, embedding: Callable[[Tensor, int], Tensor], dim: int = 256):
        super().__init__()
        self.embedding, self.dim, self.vector_dim = embedding, dim, 2 * len(SIZE_KEYS) * dim
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        numbers = torch.cat([batch[key] for key in SIZE_KEYS], 1).to(self.device_anchor.device, torch.float32)  # (B, 6)
        vector = self.embedding(numbers.flatten(), self.dim).reshape(len(numbers), self.vector_dim)
        return Condition(vector=vector.to(self.device_anchor))

    def null(self, batch: dict[str, Any]) -> Condition:
        if all(key in batch for key in SIZE_KEYS):
            return self(batch)
        return Condition(vector=self.device_anchor.new_zeros(num_rows(batch), self.vector_dim))


def uncropped(rows: int, height: int, width: int) -> dict[str, Tensor]:
    """Return SIZE_KEYS of `rows` images of height x width pixels that are neither cropped nor resized."""
    size = torch.tensor([[height, width]]).repeat(rows, 1)
    return {"original_size": size, "crop": torch.zeros_like(size), "target_size": size}
