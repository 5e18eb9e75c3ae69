"""EfficientNet-Lite0 as a feature network, for natural images if Inception's weights are not available."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.metrics.features import hash_weights, require_uint8
from ldm.net.pretrained import load_efficientnet_lite0


class EfficientNet(nn.Module):
    """EfficientNet-Lite0's ImageNet features (B, 1280) (Tan & Le 2019); its distance is `fd_effnet`, never called FID.

    Images of any size, with 3 channels (1 is repeated), are resized to size x size with antialiasing; the size is part
    of the identity, so that numbers for two sizes are never compared.
    weights: a file, None for the published ones.  Raises AssetNotFoundError if they are missing.
    """

    name = "effnet"
    num_features = 1280

    def __init__(self, size: int = 96, weights: str | Path | None = None):
        super().__init__()
        self.size, self.net = size, load_efficientnet_lite0(weights)
        self.resize = f"{size} px, bilinear, antialias=True"
        self.net.reset_classifier(0)
        self.identity = f"{hash_weights(self.net)}-{size}px"

    def train(self, mode: bool = True) -> "EfficientNet":
        """Stay in evaluation mode, whatever the mode of the parent module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 1280) float32 of images (B, 1 or 3, H, W) uint8. Raises ValueError for other input."""
        require_uint8(images, (1, 3))
        with torch.autocast(images.device.type, enabled=False):
            x = images.expand(-1, 3, -1, -1).float() / 127.5 - 1
            return self.net(
                F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
            )
