"""Perceptual distances by frozen ImageNet networks.

`name` identifies the network: no metric measures a first stage by the network of its loss.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import ConfigError
from ldm.io.download import AssetNotFoundError
from ldm.net.pretrained import load_efficientnet_lite0, load_vgg16_features, lpips_weights


class EfficientNetDistance(nn.Module):
    """Distance of unit-normalised features of EfficientNet-Lite0's five stages: LPIPS without its learned weights.

    Averaged over positions, summed over stages (Zhang et al. 2018, eq. 1), times `scale` and the number of pixels, so
    that it can be added to a loss summed over the image.
    An Error: reconstruction, image (B, 1 or 3, H, W) in [-1, 1] -> (B,).  size: side in pixels to which both are
    resized.
    weights: a file, None for the published ones.  Raises AssetNotFoundError if those are not available.
    """

    name = "effnet"
    spatial_dims = 2

    def __init__(self, size: int = 64, scale: float = 1.0, weights: str | None = None):
        super().__init__()
        self.size, self.scale = size, scale
        self.net = load_efficientnet_lite0(weights)

    def train(self, mode: bool = True) -> "EfficientNetDistance":
        return super().train(False)

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        pixels = image[0].numel()
        with torch.no_grad():
            target = self.features(image)
        distances = [
            (a - b).square().sum(1).mean((1, 2)) for a, b in zip(self.features(reconstruction), target, strict=True)
        ]
        return self.scale * pixels * torch.stack(distances).sum(0)

    def features(self, image: Tensor) -> list[Tensor]:
        """Compute feature maps (B, C_k, h_k, w_k) of the five stages, each of unit length over its channels."""
        x = F.interpolate(
            image.expand(-1, 3, -1, -1), size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        return [F.normalize(f, dim=1, eps=1e-6) for f in self.net.forward_intermediates(x, intermediates_only=True)]


class LPIPS(nn.Module):
    """The learned perceptual distance of VGG-16's five stages (Zhang et al. 2018, eq. 1).

    Multiplied by `scale` and the number of pixels and channels, because LDM adds it to the error of every pixel before
    it sums.
    An Error: reconstruction, image (B, 1 or 3, H, W) in [-1, 1], of 16 px or more -> (B,).
    weights: a file of torchvision's VGG-16, None for the published one.
    Raises AssetNotFoundError if that is not available, ConfigError for smaller images.
    """

    name = "vgg16"
    spatial_dims = 2
    LAST = (3, 8, 15, 22, 29)  # the activation that ends each stage
    mean: Tensor
    std: Tensor

    def __init__(self, scale: float = 1.0, weights: str | None = None):
        super().__init__()
        try:
            self.scale, self.net = scale, load_vgg16_features(weights)[: self.LAST[-1] + 1]
        except AssetNotFoundError as error:
            remedy = (
                "training.loss.perceptual._target_=ldm.autoencoder.perceptual.EfficientNetDistance needs only 18 MB"
            )
            raise AssetNotFoundError(f"LPIPS needs VGG-16's weights; {remedy}. {error}") from None
        for stage, learned in enumerate(lpips_weights()):
            self.register_buffer(f"weight{stage}", learned, persistent=False)
        for layer in self.net:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # a stage's output is read after the next layer has run
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        return self.scale * image[0].numel() * self.distance(reconstruction, image)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute LPIPS (B,) of images (B, 1 or 3, H, W) in [-1, 1]. Raises ConfigError below 16 px."""
        if min(b.shape[-2:]) < 16:
            raise ConfigError(f"images are {tuple(b.shape[-2:])}: LPIPS halves them four times and needs 16 px or more")
        with torch.no_grad():
            target = self.features(b)
        pairs = zip(self.features(a), target, strict=True)
        stages = [
            ((x - y).square().mean((2, 3)) * getattr(self, f"weight{k}")).sum(1) for k, (x, y) in enumerate(pairs)
        ]
        return torch.stack(stages).sum(0)

    def features(self, image: Tensor) -> list[Tensor]:
        """Compute feature maps (B, C_k, h_k, w_k) of the five stages, each of unit length over its channels."""
        h, features = (image.expand(-1, 3, -1, -1) - self.mean) / self.std, []
        for i, layer in enumerate(self.net):
            h = layer(h)
            if i in self.LAST:
                features.append(h / (h.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return features
