"""A small, fast encoder and decoder at the latent's resolution: space-to-depth, residual blocks, a linear shortcut."""

from typing import cast

from torch import Tensor, cat, nn
from torch.nn import functional as F

from ldm.net.blocks import ResBlock, norm, require_positive, zero_module


class PatchEncoder(nn.Module):
    """Image (B, C, H, W) -> moments (B, 2 z_channels, H/f, W/f).

    Patches of f x f pixels are channels of `num_res_blocks` residual blocks of `width` channels. A linear map from the
    patch directly to the mean makes training start from a linear code.
    """

    spatial_dims = 2

    def __init__(
        self, channels: int, z_channels: int, factor: int, width: int = 64, num_res_blocks: int = 2, num_groups: int = 4
    ):
        super().__init__()
        require_positive(factor=factor, width=width)
        self.factor, self.z_channels = factor, z_channels
        patch = channels * factor**2
        self.stem = nn.Conv2d(patch, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResBlock(width, width, groups=num_groups) for _ in range(num_res_blocks)))
        self.out = nn.Sequential(
            norm(width, num_groups), nn.SiLU(), zero_module(nn.Conv2d(width, 2 * z_channels, 3, padding=1))
        )
        self.shortcut = nn.Conv2d(patch, z_channels, 1)
        # start with a narrow posterior, not with unit noise
        nn.init.constant_(cast(Tensor, self.out[-1].bias)[z_channels:], -4.0)

    def forward(self, image: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(image, self.factor)  # (B, C f f, h, w)
        moments = self.out(self.blocks(self.stem(patches)))  # (B, 2 z_channels, h, w)
        mean, logvar = moments.chunk(2, dim=1)
        return cat([mean + self.shortcut(patches), logvar], dim=1)


class PatchDecoder(nn.Module):
    """Latent (B, z_channels, h, w) -> image (B, C, f h, f w): the mirrored encoder, with a linear map to the pixels."""

    spatial_dims = 2

    def __init__(
        self, channels: int, z_channels: int, factor: int, width: int = 64, num_res_blocks: int = 3, num_groups: int = 4
    ):
        super().__init__()
        require_positive(factor=factor, width=width)
        self.factor = factor
        patch = channels * factor**2
        self.stem = nn.Conv2d(z_channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResBlock(width, width, groups=num_groups) for _ in range(num_res_blocks)))
        self.out = nn.Sequential(norm(width, num_groups), nn.SiLU(), zero_module(nn.Conv2d(width, patch, 3, padding=1)))
        self.shortcut = nn.Conv2d(z_channels, patch, 1)

    def forward(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.out(self.blocks(self.stem(z))) + self.shortcut(z), self.factor)

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance the reconstruction and adversarial losses."""
        return cast(Tensor, self.out[-1].weight)
