"""CLIP's embedding of an image as the condition, for image variations (Ramesh et al. 2022)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ldm.condition import Condition
from ldm.conditioner.clip import build_clip, register_model_config
from ldm.conditioner.rows import num_rows


class CLIPImage(nn.Module):
    """CLIP's image embedding: batch["image"] (B, C, H, W) in [-1, 1] -> context (B, 1, V) and vector (B, V).

    The embedding has norm sqrt(V). The null condition is zero. Options: see CLIP. The encoder is frozen and is not part
    of this module's parameters or state.
    """

    keys = ("image",)
    concat_channels = 0
    device_anchor: Tensor  # empty; its device is the model's

    def __init__(
        self, model: str = "ViT-L-14-quickgelu", weights: str | None = None, hub: bool = False, random: bool = False
    ):
        super().__init__()
        clip, config = build_clip(register_model_config(model), weights, hub, random)
        # in a list, so that it is not trained, saved or averaged
        self.encoders = [clip.visual.eval().requires_grad_(False)]
        self.context_dim = self.vector_dim = config["embed_dim"]
        self.register_buffer("device_anchor", torch.empty(0), persistent=False)

    def forward(self, batch: dict[str, Any]) -> Condition:
        vector = self.embedding(batch["image"].to(self.device_anchor))
        return Condition(context=vector[:, None], vector=vector)

    def null(self, batch: dict[str, Any]) -> Condition:
        vector = self.device_anchor.new_zeros(num_rows(batch), self.vector_dim)
        return Condition(context=vector[:, None], vector=vector)

    @torch.no_grad()
    def embedding(self, image: Tensor) -> Tensor:
        """Embed images (B, C, H, W) in [-1, 1]: (B, V) with norm sqrt(V)."""
        device = self.device_anchor.device
        visual = self.encoders[0].to(device)
        with torch.autocast(device.type, enabled=False):
            vector = visual(preprocess(visual, image.float()))
        return normalize(vector, dim=1) * self.vector_dim**0.5


def preprocess(visual: Any, image: Tensor) -> Tensor:
    """Preprocess images for an open_clip image tower, with its own size, mean and standard deviation.

    image: (B, 1 or 3, H, W) in [-1, 1]. Returns (B, 3, S, S) float32, float64 of float64.
    """
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    mean, std = (image.new_tensor(x)[:, None, None] for x in (visual.image_mean, visual.image_std))
    image = interpolate(image, visual.image_size, mode="bicubic", antialias=True).clamp(-1, 1).expand(-1, 3, -1, -1)
    return (image / 2 + 0.5 - mean) / std
