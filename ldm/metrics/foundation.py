"""Feature networks trained on very large data sets: CLIP's two towers, and DINOv2."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import ConfigError, UserError
from ldm.io.download import AssetNotFoundError
from ldm.io.extras import extra
from ldm.metrics.features import FeatureNet, hash_weights, require_uint8


def preprocess(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize images (B, 1 or 3, H, W) uint8 and standardise them: (B, 3, size, size) float32.

    The resize is bicubic with antialiasing, without crop.
    """
    require_uint8(images, (1, 3))
    x = (
        F.interpolate(images.expand(-1, 3, -1, -1).float(), size=(size, size), mode="bicubic", antialias=True).clamp(
            0, 255
        )
        / 255
    )
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


class CLIP(nn.Module):
    """CLIP's image embeddings (B, D), and its text embeddings, both of length 1.

    towers: from ldm.conditioner.clip.load_towers.
    With ViT-L-14-336 and OpenAI's weights this is the network of CMMD (Jayasumana et al. 2024).
    """

    name = "clip"

    def __init__(self, towers: tuple[Any, Callable[[Sequence[str]], Tensor]]):
        super().__init__()
        self.clip, self.tokens = towers
        self.eval().requires_grad_(False)
        visual = self.clip.visual
        size = visual.image_size
        self.size = size if isinstance(size, int) else size[0]
        self.stats = (
            visual.image_mean or (0.48145466, 0.4578275, 0.40821073),
            visual.image_std or (0.26862954, 0.26130258, 0.27577711),
        )
        self.num_features = visual.output_dim
        self.resize = f"{self.size} px, bicubic, antialias=True"
        self.identity = hash_weights(self.clip)

    def train(self, mode: bool = True) -> "CLIP":
        """Stay in evaluation mode, whatever the mode of the parent module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 1 or 3, H, W) uint8: (B, D) float32."""
        with torch.autocast(images.device.type, enabled=False):
            return self.clip.encode_image(preprocess(images, self.size, *self.stats), normalize=True)

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Embed texts: (B, D) float32, of length 1."""
        device = self.clip.logit_scale.device
        with torch.autocast(device.type, enabled=False):
            return self.clip.encode_text(self.tokens(list(captions)).to(device), normalize=True)


class DINOv2(nn.Module):
    """DINOv2's class token (B, D) after its last norm, for FD-DINOv2 (Stein et al. 2023): ViT-L/14 at 224 px, D = 1024.

    tag: name of the model in timm.
    weights: a file in timm's format (.safetensors, .pth), None for the weights of the tag.
    Raises AssetNotFoundError if the weights are not available, UserError for a file with other content.
    """

    name = "dinov2"
    net: Any

    def __init__(
        self, tag: str = "vit_large_patch14_dinov2.lvd142m", weights: str | Path | None = None, size: int = 224
    ):
        super().__init__()
        if weights is not None and not Path(weights).expanduser().is_file():  # before the import below, which is slow
            raise AssetNotFoundError(f"{weights} is not a file: expected timm's weights of {tag}")
        if weights is None and os.environ.get("LDM_OFFLINE", "0") not in ("", "0"):
            raise AssetNotFoundError(
                f"DINOv2, {tag}, has no weights (LDM_OFFLINE is set): name a file of timm's by metrics.net.weights=FILE"
            )
        with extra("metrics", f"DINOv2, {tag},"):
            import timm
            from timm.models import load_checkpoint

        try:
            self.net = timm.create_model(tag, pretrained=weights is None, img_size=size, num_classes=0)
        except Exception as error:  # the hub's client raises many kinds
            reason = " ".join(str(error).split())[:200]
            raise AssetNotFoundError(
                f"DINOv2, {tag}, could not be fetched ({reason}): name a file of timm's by metrics.net.weights=FILE"
            ) from None
        if weights is not None:
            try:
                load_checkpoint(self.net, str(Path(weights).expanduser()), strict=True)
            except Exception as error:
                raise UserError(
                    f"{weights} does not hold timm's weights of {tag}: {' '.join(str(error).split())[:200]}"
                ) from None
        self.eval().requires_grad_(False)
        self.size, self.num_features = size, self.net.num_features
        self.resize = f"{size} px, bicubic, antialias=True"
        self.identity = f"{hash_weights(self.net)}-{size}px"

    def train(self, mode: bool = True) -> "DINOv2":
        """Stay in evaluation mode, whatever the mode of the parent module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, D) float32 of images (B, 1 or 3, H, W) uint8."""
        with torch.autocast(images.device.type, enabled=False):
            return self.net.forward_features(
                preprocess(images, self.size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
            )[:, 0]


class ImageTextNet(FeatureNet, Protocol):
    """A feature network that also embeds texts; all embeddings have length 1."""

    def embed(self, captions: Sequence[str]) -> Tensor: ...


class CLIPScore:
    """`clip_score`: mean of 100 max(cos, 0) of each image and the caption it was generated for (Hessel et al. 2021)."""

    names = ("clip_score",)

    def __init__(self, net: ImageTextNet, reference: Tensor):
        from torchmetrics.aggregation import MeanMetric

        self.embed = net.embed
        self.mean = MeanMetric(nan_strategy="error").to(reference.device).set_dtype(torch.float64)

    def update(self, features: Tensor, label: Tensor | None = None, caption: Sequence[str] | None = None) -> None:
        if caption is None:
            raise ConfigError(
                "the CLIP score needs the caption each sample was generated for, got None; "
                "sample with captions, or leave it out"
            )
        self.mean.update(100 * (features * self.embed(caption)).sum(1).double().clamp(min=0))

    def compute(self) -> dict[str, float]:
        return {"clip_score": self.mean.compute().item()}

    def reset(self) -> None:
        self.mean.reset()
