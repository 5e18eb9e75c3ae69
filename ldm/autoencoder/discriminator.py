"""The patch discriminator and its losses (Isola et al. 2017; VQGAN, Esser et al. 2021)."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.net.blocks import require_positive

MAX_ADAPTIVE_WEIGHT = 1e4  # of VQGAN's code


class PatchDiscriminator(nn.Module):
    """Image (B, C, H, W) -> a logit per patch (B, 1, h, w): `layers` strided 4x4 convolutions, then two plain ones.

    Uses group normalisation, because batch statistics would differ between one process and many.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3, num_groups: int = 32):
        super().__init__()
        require_positive(width=width, layers=layers)
        net: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            inside, outside = width * min(2 ** (level - 1), 8), width * min(2**level, 8)
            stride = 2 if level < layers else 1
            net += [nn.Conv2d(inside, outside, 4, stride, padding=1, bias=False)]
            # torch's GroupNorm, not the blocks' one: the first stages of the committed results were trained with it,
            # bit for bit
            net += [nn.GroupNorm(math.gcd(outside, num_groups), outside), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*net, nn.Conv2d(width * min(2**layers, 8), 1, 4, padding=1))
        for m in self.net:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Compute the discriminator's hinge loss from its logits for real and fake images (VQGAN eq. 5; Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, limit: float = MAX_ADAPTIVE_WEIGHT) -> Tensor:
    """Compute ||d rec / d w|| / ||d adv / d w||, at most `limit`, for the decoder's last layer w (VQGAN eq. 7)."""
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(0.0, limit).detach()
