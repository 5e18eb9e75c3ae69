"""REPA: an objective plus the alignment of one hidden layer with a frozen image encoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise, mean_per_sample


class REPA(nn.Module):
    """The loss minus `weight` times the mean cosine similarity of projected hidden features with the encoder's.

    Yu et al. 2025, section 3.
    objective: any objective.  encoder: a module whose features(image) lists maps (B, F_k, h_k, w_k); it is frozen.
    stage: the index of the map to align with.
    layer: name of a submodule of the denoiser's net that returns (B, channels, h, w), or tokens (B, h * w, channels) of
    a square map.
    channels, features, hidden: widths of that layer, of the encoder's map (F_stage), and of the three-layer projection
    network.
    Raises ConfigError if the batch has no image, the layer does not exist, or a width differs from the actual one.
    """

    spatial_dims = 2

    keys = ("image",)  # batch entries it reads, so that images are loaded along with cached latents
    encoder: Any  # a module with `features`

    def __init__(
        self,
        objective: nn.Module,
        encoder: nn.Module,
        layer: str,
        stage: int,
        channels: int,
        features: int,
        hidden: int = 512,
        weight: float = 0.5,
    ):
        super().__init__()
        self.objective, self.encoder, self.layer, self.stage, self.weight = (
            objective,
            encoder.requires_grad_(False),
            layer,
            stage,
            weight,
        )
        self.channels, self.features = channels, features
        self.project = nn.Sequential(
            nn.Linear(channels, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, features)
        )

    def forward(
        self, denoiser: Any, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the objective's terms (B,), with the alignment added to `loss`, and `similarity` in [-1, 1]."""
        if "image" not in batch:
            raise ConfigError(
                "REPA compares with pixels and the batch has no `image`; load images along with the cached latents"
            )
        hidden: list[Tensor] = []
        hook = self.find(denoiser.net).register_forward_hook(lambda module, args, out: hidden.append(out))
        try:
            terms = self.objective(denoiser, x0, cond, noise, batch)
        finally:
            hook.remove()
        with torch.no_grad():
            target = self.encoder.features(batch["image"])[self.stage]  # (B, F, h', w')
        feature_map = tokens_to_map(hidden[0])  # (B, C, h, w)
        require_width("channels", self.channels, feature_map.shape[1], self.layer)
        require_width("features", self.features, target.shape[1], f"stage {self.stage} of the encoder")
        similarity = mean_per_sample(self.similarity(feature_map, target))
        return terms | {"loss": terms["loss"] - self.weight * similarity, "similarity": similarity}

    def find(self, net: nn.Module) -> nn.Module:
        """Return the layer of the network by its name. Raises ConfigError if it does not exist."""
        modules = dict(net.named_modules())
        if self.layer not in modules:
            raise ConfigError(
                f"the network has no layer {self.layer!r}; REPA can align one of {', '.join(list(modules)[1:9])}, ..."
            )
        return modules[self.layer]

    def similarity(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Compute the cosine (B, h, w) of projected hidden (B, C, h, w) and target (B, F, h', w'), resized to h x w."""
        projected = self.project(hidden.movedim(1, -1))  # (B, h, w, F)
        target = F.interpolate(target.to(projected.dtype), size=hidden.shape[2:], mode="bilinear", antialias=True)
        return F.cosine_similarity(projected, target.movedim(1, -1), dim=-1)


def require_width(name: str, configured: int, actual: int, where: str) -> None:
    """Raise ConfigError unless the configured width is the actual one."""
    if configured != actual:
        raise ConfigError(f"{name}={configured}: {where} has {actual} channels; set {name}={actual}")


def tokens_to_map(hidden: Tensor) -> Tensor:
    """Reshape tokens (B, h * w, C) of a square map to (B, C, h, w); return a map unchanged."""
    return hidden if hidden.ndim == 4 else hidden.movedim(1, -1).unflatten(-1, (int(hidden.shape[1] ** 0.5), -1))
