"""The evaluator: a small classifier of garments or notes whose features replace Inception's; its distance is no FID."""

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.metrics.features import hash_weights, require_uint8


class JudgeNet(nn.Module):
    """A classifier of images uint8; once trained, a feature network whose distance is `fd_<name>`.

    Training: cross-entropy on `logits(images)`, `standardise(penultimate features of the training set)`, `.eval()`.
    A subclass sets `body`, images (B, C, H, W) in float32 -> features (B, num_features), and what the class attributes
    say: channels and size of the images, mean and deviation of the training pixels.
    heads: name of a target in the batch -> number of its classes; the first one's are those of `classify`.
    """

    name: str
    resize = "none"
    size: int | None
    pixel_mean: float
    pixel_std: float
    body: nn.Module
    mean: Tensor
    std: Tensor

    def __init__(self, num_features: int, heads: dict[str, int]):
        super().__init__()
        self.num_features, self.heads = num_features, heads

    def _finish(self) -> None:
        """Add what follows the body."""
        self.head = nn.Linear(self.num_features, sum(self.heads.values()))
        self.register_buffer("mean", torch.zeros(self.num_features))
        self.register_buffer("std", torch.ones(self.num_features))

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of the weights, including the standardisation."""
        return hash_weights(self)

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of images (B, 1, H, W) uint8."""
        require_uint8(images, (1,), self.size)
        x = (images.to(self.mean.dtype) - self.pixel_mean) / self.pixel_std
        return self.body(x.contiguous(memory_format=torch.channels_last))

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (B, classes of all heads) of images (B, 1, H, W) uint8, for training."""
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
        """Return standardised features (B, num_features) float32 of images (B, 1, H, W) uint8.

        Raises ValueError in training mode.
        """
        if self.training:  # batch normalisation would make a score depend on the batch
            raise ValueError(
                f"{type(self).__name__} is in training mode: its features are defined in evaluation mode; call .eval()"
            )
        with torch.autocast(images.device.type, enabled=False):
            return (self.penultimate(images) - self.mean) / self.std

    def classify(self, features: Tensor) -> Tensor:
        """Return the first head's logits of standardised features (B, num_features), without a pass over the images."""
        return self.classify_all(features)[next(iter(self.heads))]

    def classify_all(self, features: Tensor) -> dict[str, Tensor]:
        """Return the logits (B, classes) of each head, by its name, of standardised features (B, num_features)."""
        with torch.autocast(features.device.type, enabled=False):
            logits = self.head(features * self.std + self.mean)
        return dict(zip(self.heads, logits.split(list(self.heads.values()), 1), strict=True))


class FashionNet(JudgeNet):
    """A classifier of images (B, 1, 32, 32) uint8, Fashion-MNIST padded from 28 px. Its distance is `fd_fashion`."""

    name = "fashion"
    size = 32
    pixel_mean, pixel_std = 73, 90

    def __init__(self, width: int = 24, num_features: int = 128, num_classes: int = 10):
        super().__init__(num_features, {"label": num_classes})
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 4, 16, 16)
            *_conv(4, width),
            *_conv(width, 2 * width),
            nn.MaxPool2d(2),  # (B, 2w, 8, 8)
            *_conv(2 * width, 4 * width),
            nn.MaxPool2d(2),  # (B, 4w, 4, 4)
            *_features(64 * width, num_features),
        )
        self._finish()


class NoteNet(JudgeNet):
    """A classifier of log-mel spectrograms (B, 1, 128, T) uint8 of data=notes. Its distance is `fd_notes`.

    It is trained on the family of the instrument, `label`, and MIDI's pitch together.
    """

    name = "notes"
    size = None
    pixel_mean, pixel_std = 56, 46

    def __init__(self, width: int = 24, num_features: int = 128, num_classes: int = 12, num_pitches: int = 128):
        super().__init__(num_features, {"label": num_classes, "pitch": num_pitches})
        self.body = nn.Sequential(
            nn.Conv2d(1, width, (5, 4), (1, 4), (2, 0), bias=False),  # (B, w, 128, T/4): pitch is in the fine bands
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.MaxPool2d((1, 2)),  # (B, w, 128, T/8)
            *_conv(width, 2 * width),
            nn.MaxPool2d((2, 2)),  # (B, 2w, 64, T/16)
            *_conv(2 * width, 4 * width),
            nn.MaxPool2d((2, 1)),  # (B, 4w, 32, T/16)
            nn.AdaptiveAvgPool2d((32, 2)),
            *_features(256 * width, num_features),
        )
        self._finish()


def _conv(inside: int, outside: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.SiLU()]


def _features(inside: int, num_features: int) -> list[nn.Module]:
    """Layers from a map of `inside` numbers to features.

    They are normalised before the activation, so that none is almost constant: standardised, it would dominate the
    distance.
    """
    return [
        nn.Flatten(),
        nn.Linear(inside, num_features, bias=False),
        nn.BatchNorm1d(num_features),
        nn.SiLU(),
    ]
