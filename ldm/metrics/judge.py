"""The evaluator: a small clothing classifier whose features replace Inception's; its distance is not called FID."""

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.metrics.features import hash_weights, require_uint8


class FashionNet(nn.Module):
    """A classifier of images (B, 1, 32, 32) uint8; once trained, a feature network whose distance is `fd_fashion`.

    Images: Fashion-MNIST zero-padded from 28 px.
    Training: cross-entropy on `logits(images)`, `standardise(penultimate features of the training set)`, `.eval()`.
    """

    name = "fashion"
    resize = "none"
    mean: Tensor
    std: Tensor

    def __init__(self, width: int = 24, num_features: int = 128, num_classes: int = 10):
        super().__init__()

        def conv(inside: int, outside: int) -> list[nn.Module]:
            return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.SiLU()]

        self.num_features = num_features
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 4, 16, 16)
            *conv(4, width),
            *conv(width, 2 * width),
            nn.MaxPool2d(2),  # (B, 2w, 8, 8)
            *conv(2 * width, 4 * width),
            nn.MaxPool2d(2),  # (B, 4w, 4, 4)
            nn.Flatten(),
            nn.Linear(64 * width, num_features, bias=False),
            # normalised before the activation, so that no feature is almost constant: standardised, it would dominate
            # the distance
            nn.BatchNorm1d(num_features),
            nn.SiLU(),
        )
        self.head = nn.Linear(num_features, num_classes)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of the weights, including the standardisation."""
        return hash_weights(self)

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of images (B, 1, 32, 32) uint8."""
        require_uint8(images, (1,), 32)
        x = (images.to(self.mean.dtype) - 73) / 90  # mean and standard deviation of the training pixels
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, 1, 32, 32) uint8, for training."""
        return self.head(self.penultimate(images))

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Set mean and std from penultimate features (N, num_features) of the training set, taken in evaluation mode.

        Raises UserError if one is constant.
        """
        std, mean = torch.std_mean(features.double(), 0)
        alive = int((std > 1e-6).sum())
        if alive < len(std):
            raise UserError(
                f"{len(std) - alive} of {len(std)} features are constant or not finite: expected a trained network; "
                f"train longer"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, images: Tensor) -> Tensor:
        """Return standardised features (B, num_features) float32 of images (B, 1, 32, 32) uint8.

        Raises ValueError in training mode.
        """
        if self.training:  # batch normalisation would make a score depend on the batch
            raise ValueError(
                "FashionNet is in training mode: its features are defined in evaluation mode; call .eval()"
            )
        with torch.autocast(images.device.type, enabled=False):
            return (self.penultimate(images) - self.mean) / self.std

    def classify(self, features: Tensor) -> Tensor:
        """Return logits (B, num_classes) of standardised features (B, num_features), without a pass over the images."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features * self.std + self.mean)
