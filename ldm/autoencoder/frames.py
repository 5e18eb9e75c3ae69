"""Encoders and decoders of images, applied to every frame of a clip: the baseline of those over space and time.

So are the first stages of latent video models that use an image model's, as Latte (Ma et al. 2024). Weights have the
names that the image's encoder and decoder have, so that those of a trained one load.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ldm.autoencoder.conv import Decoder, Encoder
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.errors import ConfigError


class FramePatchEncoder(PatchEncoder):
    """PatchEncoder of every frame: (B, C, F, H, W) -> moments (B, 2 z_channels, F, H/f, W/f).

    factor: [1, f, f], of frames, height and width.  The other options are PatchEncoder's.
    """

    spatial_dims = 3  # type: ignore[assignment]

    def __init__(self, channels: int, z_channels: int, factor: Sequence[int], **options: Any):
        super().__init__(channels, z_channels, frame_factor(factor), **options)

    def forward(self, image: Tensor) -> Tensor:
        return each_frame(super().forward, image)


class FramePatchDecoder(PatchDecoder):
    """PatchDecoder of every frame: (B, z_channels, F, h, w) -> (B, C, F, f h, f w); options as in FramePatchEncoder."""

    spatial_dims = 3  # type: ignore[assignment]

    def __init__(self, channels: int, z_channels: int, factor: Sequence[int], **options: Any):
        super().__init__(channels, z_channels, frame_factor(factor), **options)

    def forward(self, z: Tensor) -> Tensor:
        return each_frame(super().forward, z)


class FrameEncoder(Encoder):
    """Encoder of every frame: (B, C, F, H, W) -> moments (B, 2 z_channels, F, H/f, W/f).

    factor: [1, f, f], of frames, height and width.  The other options are Encoder's.
    """

    spatial_dims = 3  # type: ignore[assignment]

    def __init__(self, factor: Sequence[int], **options: Any):
        super().__init__(factor=frame_factor(factor), **options)

    def forward(self, image: Tensor) -> Tensor:
        return each_frame(super().forward, image)


class FrameDecoder(Decoder):
    """Decoder of every frame: (B, z_channels, F, h, w) -> (B, C, F, f h, f w); options as in FrameEncoder."""

    spatial_dims = 3  # type: ignore[assignment]

    def __init__(self, factor: Sequence[int], **options: Any):
        super().__init__(factor=frame_factor(factor), **options)

    def forward(self, z: Tensor) -> Tensor:
        return each_frame(super().forward, z)


def each_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of images (N, C, H, W) to the frames of clips (B, C, F, H, W)."""
    return function(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), x.shape[2])).transpose(1, 2)


def frame_factor(factor: Sequence[int]) -> list[int]:
    """Return the factor of a frame's sides. Raises ConfigError unless the clip's is 1 for frames."""
    sides: list[int] = [] if isinstance(factor, int) else list(factor)
    if len(sides) != 3 or sides[0] != 1:
        raise ConfigError(f"factor={factor}: expected [1,f,f], as every frame is encoded by itself")
    return sides[1:]
