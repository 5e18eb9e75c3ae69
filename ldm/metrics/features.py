"""Feature networks for distribution metrics; every number carries the name and the hash of its network."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.io.download import AssetNotFoundError, fetch, from_url
from ldm.io.extras import extra
from ldm.io.images import to_uint8
from ldm.tensors import hash_state_dict


class FeatureNet(Protocol):
    """A feature network: images (B, C, H, W) uint8 -> features (B, num_features) float32.

    An image's features do not depend on the rest of the batch.
    name: part of the metric's key (`fd_<name>`).
    identity: SHA-256 of the weights; numbers of two identities are never compared.
    """

    name: str
    num_features: int
    resize: str  # description of the resizing to its input size, "none" without one

    @property
    def identity(self) -> str: ...
    def __call__(self, images: Tensor) -> Tensor: ...


class Classifier(FeatureNet, Protocol):
    """A feature network that also classifies: features (B, num_features) -> logits (B, num_classes)."""

    def classify(self, features: Tensor) -> Tensor: ...


def require_uint8(images: Tensor, channels: tuple[int, ...], size: int | None = None) -> None:
    """Raise ValueError unless images are (B, C, H, W) uint8 with one of these channel counts and H = W = size.

    size: None allows any size.
    """
    # torchmetrics passes any tensor to a custom network: floats in [0, 1] would be scored without an error
    if images.dtype != torch.uint8:
        raise ValueError(
            f"a feature network takes uint8 images, got {images.dtype}; quantise with ldm.io.images.to_uint8"
        )
    if images.ndim != 4 or images.shape[1] not in channels or (size and images.shape[2:] != (size, size)):
        side = size or "any"
        raise ConfigError(
            f"images are {tuple(images.shape)}: expected (B, {' or '.join(map(str, channels))}, {side}, {side})"
        )


def hash_weights(module: nn.Module) -> str:
    """Return the SHA-256 (hex) of every parameter and buffer of a module: name, type, shape and bytes."""
    return hash_state_dict(
        {f"{name} {value.dtype} {tuple(value.shape)}": value for name, value in module.state_dict().items()}
    )


@torch.inference_mode()
def extract(net: FeatureNet, batches: Iterable[Tensor]) -> Tensor:
    """Return the features (N, D) float32, on the CPU, of batches of images (B, C, H, W) in [-1, 1].

    They are the reference of a metric.
    """
    features = [net(to_uint8(image)).cpu() for image in batches]
    if not features:
        raise ConfigError("no images to take features of: the iterable of batches is empty")
    return torch.cat(features).clone()  # the clone is an ordinary tensor outside inference mode


class Brightness(nn.Module):
    """The mean grey level (B, 1) of images (B, C, H, W) uint8.

    Schedules that leave signal at t = 1 keep it near the middle (Lin et al. 2023, section 3.1).
    """

    name = "brightness"
    num_features = 1
    resize = "none"
    identity = "mean of all pixels"

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float().mean(1, keepdim=True)


class Inception(nn.Module):
    """The Inception-v3 of the FID literature, pool3 features (B, 2048).

    It is torch-fidelity's port of TensorFlow's weights of 2015-12-05. Images of any size, with 3 channels (1 is
    repeated), are resized to 299 as TensorFlow 1 did, without antialiasing, as in the published protocol.
    weights: a file; else $LDM_INCEPTION, the cache, torch.hub's folder, a download.
    Raises AssetNotFoundError, naming the file and its source.
    """

    name = "inception"
    num_features = 2048
    resize = "299 px, bilinear of TensorFlow 1, antialias=False"
    FILE = "weights-inception-2015-12-05-6726825d.pth"
    SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
    ROOT = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = self.find(weights)  # before the import below, which is slow: a missing file is said at once
        with extra("metrics", "Inception"):
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.net = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
        self.identity = hash_weights(self.net)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits (B, 1008) of features (B, 2048), without the bias, as the literature's inception score does."""
        return features @ self.net.fc.weight.T

    @classmethod
    def find(cls, weights: str | Path | None = None) -> Path:
        """Return the file of weights, downloaded if needed."""
        if file := weights or os.environ.get("LDM_INCEPTION"):
            if not Path(file).is_file():
                raise AssetNotFoundError(
                    f"{file} is not a file: expected Inception's weights {cls.FILE}; {cls.ROOT}{cls.FILE} has them"
                )
            return Path(file)
        files = {cls.FILE: cls.SHA256}
        hub = Path(torch.hub.get_dir(), "checkpoints")
        try:
            folder = fetch(
                "inception",
                files,
                [hub],
                {"torch-fidelity's release": lambda scratch: from_url(cls.ROOT, list(files), scratch)},
            )
        except AssetNotFoundError as error:
            raise AssetNotFoundError(
                f"FID needs {cls.ROOT}{cls.FILE} (LDM_INCEPTION may name a copy): {error}"
            ) from None
        return folder / cls.FILE

    def train(self, mode: bool = True) -> "Inception":
        """Stay in evaluation mode, whatever the mode of the parent module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 2048) float32 of images (B, 1 or 3, H, W) uint8. Raises ValueError for other input."""
        require_uint8(images, (1, 3))
        with torch.autocast(images.device.type, enabled=False):
            return self.net(images.expand(-1, 3, -1, -1))[0]


class SpatialInception(Inception):
    """Inception with ADM's spatial features after pool3: (B, 2048 + 2023), for sFID.

    They are 7 of the 192 channels of TensorFlow's `mixed_6/conv`, after its activation, at 17 x 17 positions, flattened
    position by position as in TensorFlow; in torch-fidelity's port that is the output of Mixed_6d.branch1x1.
    Dhariwal & Nichol 2021; Nash et al. 2021.
    """

    name = "inception_spatial"
    pooled = Inception.num_features
    num_features = Inception.num_features + 7 * 17 * 17

    def __init__(self, weights: str | Path | None = None):
        super().__init__(weights)
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._store_spatial)

    def _store_spatial(self, module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        """Store the spatial features of a forward pass (forward hook)."""
        self.spatial = out[:, :7].permute(0, 2, 3, 1).flatten(1)  # (B, 17, 17, 7), flattened to 2023

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 4071) float32, pool3 first, of images (B, 1 or 3, H, W) uint8.

        Raises ValueError for other input.
        """
        return torch.cat([super().forward(images), self.spatial], 1)

    def classify(self, features: Tensor) -> Tensor:
        """Return logits as Inception's, from pool3 alone."""
        return super().classify(features[:, : self.pooled])
