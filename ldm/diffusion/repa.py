"""REPA: an objective plus the alignment of one hidden layer with a frozen image encoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise, mean_per_sample


class REPA(nn.Module):
    """loss - weight * mean cosine similarity of projected hidden features with the encoder's (Yu et al. 2025, section 3).

    objective: any objective.  encoder: a module whose features(image) lists maps (B, F_k, h_k, w_k); `stage` says which; it is frozen.
    layer: a submodule of the denoiser's net, by name, that returns (B, channels, h, w), or tokens (B, h * w, channels) of a square map.
    channels, features, hidden: widths of that layer, of the encoder's map (F_stage), and of the projecting three-layer network.
    Raises ConfigError if the batch has no image, the layer is not there or a width is not what it is.
    """

    keys = ("image",)  # of the batch: with it, images stay beside cached latents
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
        """The objective's terms (B,) with `loss` joined by the alignment, and `similarity` in [-1, 1]."""
        if "image" not in batch:
            raise ConfigError(
                "REPA compares with pixels and the batch has no `image`; give it one beside the cached latents"
            )
        hidden: list[Tensor] = []
        hook = self.find(denoiser.net).register_forward_hook(lambda module, args, out: hidden.append(out))
        try:
            terms = self.objective(denoiser, x0, cond, noise, batch)
        finally:
            hook.remove()
        with torch.no_grad():
            wanted = self.encoder.features(batch["image"])[self.stage]  # (B, F, h', w')
        found = tokens_to_map(hidden[0])  # (B, C, h, w)
        require_width("channels", self.channels, found.shape[1], self.layer)
        require_width("features", self.features, wanted.shape[1], f"stage {self.stage} of the encoder")
        similarity = mean_per_sample(self.similarity(found, wanted))
        return terms | {"loss": terms["loss"] - self.weight * similarity, "similarity": similarity}

    def find(self, net: nn.Module) -> nn.Module:
        """The named layer of the network. Raises ConfigError if it is not there."""
        modules = dict(net.named_modules())
        if self.layer not in modules:
            raise ConfigError(
                f"the network has no layer {self.layer!r}; REPA can align one of {', '.join(list(modules)[1:9])}, ..."
            )
        return modules[self.layer]

    def similarity(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        """Cosine (B, h, w) of projected hidden (B, C, h, w) and wanted (B, F, h', w'), which is resized to it."""
        projected = self.project(hidden.movedim(1, -1))  # (B, h, w, F)
        wanted = F.interpolate(wanted.to(projected.dtype), size=hidden.shape[2:], mode="bilinear", antialias=True)
        return F.cosine_similarity(projected, wanted.movedim(1, -1), dim=-1)


def require_width(name: str, said: int, found: int, where: str) -> None:
    """Raises ConfigError unless a width is what was said of it."""
    if said != found:
        raise ConfigError(f"{name}={said}: {where} has {found} channels; set {name}={found}")


def tokens_to_map(hidden: Tensor) -> Tensor:
    """(B, C, h, w) from itself, or from tokens (B, h * w, C) of a square map."""
    return hidden if hidden.ndim == 4 else hidden.movedim(1, -1).unflatten(-1, (int(hidden.shape[1] ** 0.5), -1))
