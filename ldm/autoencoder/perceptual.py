"""Perceptual distance through a frozen ImageNet network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class EfficientNetDistance(nn.Module):
    """Distance of unit-normalised features of EfficientNet-Lite0's five stages, averaged over places, summed over stages (LPIPS without its
    learned weights, Zhang et al. 2018, eq. 1), times `scale` and the number of pixels, to stand beside a loss summed over the image.

    An Error: reconstruction, image (B, 1 or 3, H, W) in [-1, 1] -> (B,).  size: the side both are resized to.  weights: a file, None for
    the published ones.  Raises AssetError where those are not to be had.
    """

    def __init__(self, size: int = 64, scale: float = 1.0, weights: str | None = None):
        super().__init__()
        import timm

        from ldm.fetch import efficientnet_lite0

        state = torch.load(weights or efficientnet_lite0(), map_location="cpu", weights_only=True)
        whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        names = list(whole.state_dict())
        whole.load_state_dict(dict(zip(names, state.values(), strict=True)))  # the file has timm's order and other names
        net = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True)
        net.load_state_dict({name: value for name, value in whole.state_dict().items() if name in net.state_dict()})
        self.size, self.scale = size, scale
        self.net = net.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "EfficientNetDistance":
        return super().train(False)

    def forward(self, reconstruction: Tensor, image: Tensor) -> Tensor:
        pixels = image[0].numel()
        with torch.no_grad():
            wanted = self.features(image)
        distances = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(self.features(reconstruction), wanted, strict=True)]
        return self.scale * pixels * torch.stack(distances).sum(0)

    def features(self, image: Tensor) -> list[Tensor]:
        """Feature maps (B, C_k, h_k, w_k) of the five stages, each of unit length over its channels."""
        x = F.interpolate(image.expand(-1, 3, -1, -1), size=(self.size, self.size), mode="bilinear", align_corners=False)
        return [F.normalize(f, dim=1, eps=1e-6) for f in self.net(x)]
