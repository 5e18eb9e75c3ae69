"""Published networks with their published weights, which more than one package uses."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.io.download import efficientnet_lite0, vgg16
from ldm.io.extras import extra


def load_efficientnet_lite0(weights: str | Path | None = None) -> Any:
    """Load EfficientNet-Lite0 (Tan & Le 2019; timm's `tf_efficientnet_lite0`), frozen, for RGB (B, 3, H, W) in [-1, 1].

    weights: a file, None for the published ones.  Raises AssetNotFoundError if those are not available.
    """
    with extra("metrics", "EfficientNet-Lite0"):
        import timm

    state = torch.load(weights or efficientnet_lite0(), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # the file has timm's order and other names
    net.load_state_dict(dict(zip(net.state_dict(), state.values(), strict=True)))
    return net.eval().requires_grad_(False)


def load_vgg16_features(weights: str | Path | None = None) -> nn.Sequential:
    """Load VGG-16's convolutions (torchvision's `features`), frozen.

    They take RGB (B, 3, H, W) normalised to ImageNet's mean 0 and variance 1.
    weights: a file of the complete classifier, None for the published one.  Raises AssetNotFoundError if that is not
    available.
    """
    path = weights or vgg16()  # before the import below, which is slow, so that a missing file is reported at once
    from torchvision.models import vgg16 as build_vgg16

    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # most of its weights are the classifier's, which is left out
        net = build_vgg16(weights=None).features
    net.load_state_dict(
        {name.removeprefix("features."): v for name, v in state.items() if name.startswith("features.")}, assign=True
    )
    return net.eval().requires_grad_(False)


def lpips_weights() -> list[Tensor]:
    """Load LPIPS's learned weights (C_k,) for VGG-16's five stages (Zhang et al. 2018, v0.1; part of torchmetrics)."""
    import torchmetrics.functional.image

    path = Path(torchmetrics.functional.image.__file__).with_name("lpips_models") / "vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{stage}.model.1.weight"].flatten() for stage in range(5)]
