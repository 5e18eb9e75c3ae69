"""Evaluators: small classifiers of real samples whose features replace Inception's; their distance is not FID."""

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError, UserError
from ldm.metrics.features import hash_weights, require_uint8


class Judge(nn.Module):
    """A classifier of uint8 samples; once trained, a feature network whose distance is `fd_<name>`.

    Training: cross-entropy on `logits(images)`, `standardise(penultimate features of the training set)`, `.eval()`.
    body: samples, as `penultimate` prepares them -> features (B, num_features).
    A subclass defines `name` and `penultimate`.
    """

    name: str
    resize = "none"
    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, num_features: int, num_classes: int):
        super().__init__()
        self.body, self.num_features = body, num_features
        self.head = nn.Linear(num_features, num_classes)
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of the weights, including the standardisation."""
        return hash_weights(self)

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of uint8 samples."""
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of uint8 samples, for training."""
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
        """Return standardised features (B, num_features) float32 of uint8 samples.

        Raises ValueError in training mode.
        """
        if self.training:  # batch normalisation would make a score depend on the batch
            raise ValueError(
                f"{type(self).__name__} is in training mode: its features are defined in evaluation mode; call .eval()"
            )
        with torch.autocast(images.device.type, enabled=False):
            return (self.penultimate(images) - self.mean) / self.std

    def classify(self, features: Tensor) -> Tensor:
        """Return logits (B, num_classes) of standardised features (B, num_features), without a pass over the images."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features * self.std + self.mean)


class FashionNet(Judge):
    """The judge of images (B, 1, 32, 32) uint8: Fashion-MNIST zero-padded from 28 px; `fd_fashion`."""

    name = "fashion"

    def __init__(self, width: int = 24, num_features: int = 128, num_classes: int = 10):
        def conv(inside: int, outside: int) -> list[nn.Module]:
            return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.SiLU()]

        body = nn.Sequential(
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
        super().__init__(body, num_features, num_classes)

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of images (B, 1, 32, 32) uint8."""
        require_uint8(images, (1,), 32)
        x = (images.to(self.mean.dtype) - 73) / 90  # mean and standard deviation of the training pixels
        return self.body(x.contiguous(memory_format=torch.channels_last))


class MovingNet(Judge):
    """The judge of clips (B, 1, F, H, W) uint8 of ldm.data.moving: garment and motion; `fd_moving`.

    Its logits are those of the garments, then those of the motions: convolutions over space and time see both.
    F, H and W are at least 8, 32 and 32.
    """

    name = "moving"

    def __init__(self, width: int = 16, num_features: int = 64, garments: int = 10, motions: int = 9):
        def conv(inside: int, outside: int, stride: tuple[int, int, int]) -> list[nn.Module]:
            return [nn.Conv3d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm3d(outside), nn.SiLU()]

        body = nn.Sequential(
            *conv(1, width, (1, 2, 2)),
            *conv(width, 2 * width, (2, 2, 2)),
            *conv(2 * width, 4 * width, (2, 2, 2)),
            *conv(4 * width, 4 * width, (1, 1, 1)),
            nn.AdaptiveAvgPool3d((2, 4, 4)),
            nn.Flatten(),
            nn.Linear(128 * width, num_features, bias=False),
            nn.BatchNorm1d(num_features),
            nn.SiLU(),
        )
        super().__init__(body, num_features, garments + motions)
        self.garments = garments

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of clips (B, 1, F, H, W) uint8."""
        if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[1] != 1:
            raise ConfigError(f"clips of {images.dtype} {tuple(images.shape)}: expected (B, 1, F, H, W) uint8")
        return self.body((images.to(self.mean.dtype) - 20) / 55)  # about the clips' mean and standard deviation

    def split(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the garments (B, garments) and of the motions (B, motions)."""
        garment, motion = logits.tensor_split([self.garments], dim=1)
        return garment, motion
