"""The encoder and decoder of latent diffusion's first stages (LDM app. G): ADM-style residual blocks over a pyramid."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.net.attention import sdpa
from ldm.net.blocks import ResBlock, Upsample, norm


class SpatialAttention(nn.Module):
    """Single-head attention of a feature map (B, C, H, W) over itself, added to what came in."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = norm(channels, groups)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)  # (B, 1, H W, C)
        return x + self.out(sdpa(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape))


class PaddedDownsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution, padded on the right and below as the first stages of LDM do."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def middle(width: int, groups: int) -> nn.Sequential:
    """Residual block, attention, residual block."""
    return nn.Sequential(ResBlock(width, width, groups=groups), SpatialAttention(width, groups), ResBlock(width, width, groups=groups))


class Encoder(nn.Module):
    """Image (B, C, H, W) -> moments (B, 2 z_channels, H/f, W/f) with f = 2^(len(mult) - 1)."""

    def __init__(
        self,
        channels: int = 3,
        z_channels: int = 4,
        width: int = 128,
        mult: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        groups: int = 32,
    ):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Sequential()
        inside = width
        for level, factor in enumerate(mult):
            for _ in range(blocks):
                self.down.append(ResBlock(inside, factor * width, groups=groups))
                inside = factor * width
            if level < len(mult) - 1:
                self.down.append(PaddedDownsample(inside))
        self.middle = middle(inside, groups)
        self.out = nn.Sequential(norm(inside, groups), nn.SiLU(), nn.Conv2d(inside, 2 * z_channels, 3, padding=1))
        self.moments = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.moments(self.out(self.middle(self.down(self.stem(image)))))


class Decoder(nn.Module):
    """Latent (B, z_channels, h, w) -> image (B, C, f h, f w) with f = 2^(len(mult) - 1)."""

    def __init__(
        self,
        channels: int = 3,
        z_channels: int = 4,
        width: int = 128,
        mult: Sequence[int] = (1, 2, 4, 4),
        blocks: int = 2,
        groups: int = 32,
    ):
        super().__init__()
        inside = mult[-1] * width
        self.latent = nn.Conv2d(z_channels, z_channels, 1)
        self.stem = nn.Conv2d(z_channels, inside, 3, padding=1)
        self.middle = middle(inside, groups)
        self.up = nn.Sequential()
        for level, factor in reversed(list(enumerate(mult))):
            for _ in range(blocks + 1):
                self.up.append(ResBlock(inside, factor * width, groups=groups))
                inside = factor * width
            if level > 0:
                self.up.append(Upsample(inside))
        self.out = nn.Sequential(norm(inside, groups), nn.SiLU(), nn.Conv2d(inside, channels, 3, padding=1))

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.up(self.middle(self.stem(self.latent(z)))))

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradients balance reconstruction and adversary."""
        return self.out[-1].weight
