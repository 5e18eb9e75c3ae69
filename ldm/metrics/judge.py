"""Evaluators: small classifiers of real samples whose features replace Inception's; their distance is not FID."""

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.metrics.features import hash_weights, require_uint8


class Judge(nn.Module):
    """A classifier of uint8 samples; once trained, a feature network whose distance is `fd_<name>`.

    Training: cross-entropy on `logits(images)`, `standardise(penultimate features of the training set)`, `.eval()`.
    body: samples, as `penultimate` prepares them -> features (B, num_features).
    heads: name of a target in the batch -> number of its classes; the first one's are those of `classify`.
    A subclass defines `name` and `penultimate`.
    """

    name: str
    resize = "none"
    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Module, num_features: int, heads: dict[str, int]):
        super().__init__()
        self.body, self.num_features, self.heads = body, num_features, heads
        self.head = nn.Linear(num_features, sum(heads.values()))
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
        """Return logits (B, classes of all heads) of uint8 samples, for training."""
        return self.head(self.penultimate(images))

    def split(self, logits: Tensor) -> dict[str, Tensor]:
        """Return the logits (B, classes) of each head, by its name."""
        return dict(zip(self.heads, logits.split(list(self.heads.values()), 1), strict=True))

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
        """Return the first head's logits of standardised features (B, num_features), without a pass over samples."""
        return self.classify_all(features)[next(iter(self.heads))]

    def classify_all(self, features: Tensor) -> dict[str, Tensor]:
        """Return the logits (B, classes) of each head, by its name, of standardised features (B, num_features)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.split(self.head(features * self.std + self.mean))


class FashionNet(Judge):
    """The judge of images (B, 1, 32, 32) uint8: Fashion-MNIST zero-padded from 28 px; `fd_fashion`."""

    name = "fashion"

    def __init__(self, width: int = 24, num_features: int = 128, num_classes: int = 10):
        body = nn.Sequential(
            nn.PixelUnshuffle(2),  # (B, 4, 16, 16)
            *conv_layers(4, width),
            *conv_layers(width, 2 * width),
            nn.MaxPool2d(2),  # (B, 2w, 8, 8)
            *conv_layers(2 * width, 4 * width),
            nn.MaxPool2d(2),  # (B, 4w, 4, 4)
            *feature_layers(64 * width, num_features),
        )
        super().__init__(body, num_features, {"label": num_classes})

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of images (B, 1, 32, 32) uint8."""
        require_uint8(images, (1,), 32)
        x = (images.to(self.mean.dtype) - 73) / 90  # mean and standard deviation of the training pixels
        return self.body(x.contiguous(memory_format=torch.channels_last))


def conv_layers(inside: int, outside: int) -> list[nn.Module]:
    """Build a 3x3 convolution, normalised over the batch, and its activation."""
    return [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.SiLU()]


def feature_layers(inside: int, num_features: int) -> list[nn.Module]:
    """Build the layers from a map of `inside` numbers to features.

    They are normalised before the activation, so that none is almost constant: standardised, it would dominate the
    distance.
    """
    return [
        nn.Flatten(),
        nn.Linear(inside, num_features, bias=False),
        nn.BatchNorm1d(num_features),
        nn.SiLU(),
    ]
