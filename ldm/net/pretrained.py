"""Published networks with their published weights, built where more than one room looks through them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.io.download import efficientnet_lite0, vgg16
from ldm.io.extras import extra


def load_efficientnet_lite0(weights: str | Path | None = None) -> Any:
    """EfficientNet-Lite0 (Tan & Le 2019; timm's `tf_efficientnet_lite0`), frozen, for RGB (B, 3, H, W) in [-1, 1].

    weights: a file, None for the published ones.  Raises AssetNotFoundError where those are not to be had.
    """
    with extra("metrics", "EfficientNet-Lite0"):
        import timm

    state = torch.load(weights or efficientnet_lite0(), map_location="cpu", weights_only=True)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    net.load_state_dict(
        dict(zip(net.state_dict(), state.values(), strict=True))
    )  # the file has timm's order and other names
    return net.eval().requires_grad_(False)


def load_vgg16_features(weights: str | Path | None = None) -> nn.Sequential:
    """VGG-16's convolutions (torchvision's `features`), frozen, for RGB (B, 3, H, W) of ImageNet's mean 0 and variance 1.

    weights: a file of the whole classifier, None for the published one.  Raises AssetNotFoundError where that is not to be had.
    """
    path = weights or vgg16()  # before the import below, which is slow: a missing file is said at once
    from torchvision.models import vgg16 as make

    state = torch.load(path, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # most of its weights are the classifier's, which is left out
        net = make(weights=None).features
    net.load_state_dict(
        {name.removeprefix("features."): v for name, v in state.items() if name.startswith("features.")}, assign=True
    )
    return net.eval().requires_grad_(False)


def lpips_weights() -> list[Tensor]:
    """LPIPS's learned weights (C_k,) for VGG-16's five stages (Zhang et al. 2018, v0.1; they come with torchmetrics)."""
    import torchmetrics.functional.image

    path = Path(torchmetrics.functional.image.__file__).with_name("lpips_models") / "vgg.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{stage}.model.1.weight"].flatten() for stage in range(5)]
