"""The judge of moving garments."""

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.metrics.judge import Judge, feature_layers


class MovingNet(Judge):
    """The judge of clips (B, 1, F, H, W) uint8 of ldm.data.moving: garment and motion; `fd_moving`.

    Convolutions over space and time see both.  F, H and W are at least 8, 32 and 32.
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
            *feature_layers(128 * width, num_features),
        )
        super().__init__(body, num_features, {"label": garments, "motion": motions})

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of clips (B, 1, F, H, W) uint8."""
        if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[1] != 1:
            raise ConfigError(f"clips of {images.dtype} {tuple(images.shape)}: expected (B, 1, F, H, W) uint8")
        return self.body((images.to(self.mean.dtype) - 20) / 55)  # about the clips' mean and standard deviation
