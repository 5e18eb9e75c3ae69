"""The patch discriminator and its losses (Isola et al. 2017; VQGAN, Esser et al. 2021)."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.net.blocks import CONV, require_positive
from ldm.tensors import frames

MAX_ADAPTIVE_WEIGHT = 1e4  # of VQGAN's code


class PatchDiscriminator(nn.Module):
    """Image (B, C, H, W) -> a logit per patch (B, 1, h, w): `layers` strided 4x4 convolutions, then two plain ones.

    dims: sides of a sample.  Of (B, C, L), a patch is a stretch: (B, 1, l); a clip (B, C, F, H, W) is judged frame by
    frame: (B F, 1, h, w).
    Uses group normalisation, because batch statistics would differ between one process and many.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3, num_groups: int = 32, dims: int = 2):
        super().__init__()
        require_positive(width=width, layers=layers)
        conv = CONV[min(dims, 2)]
        net: list[nn.Module] = [conv(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            inside, outside = width * min(2 ** (level - 1), 8), width * min(2**level, 8)
            stride = 2 if level < layers else 1
            net += [conv(inside, outside, 4, stride, padding=1, bias=False)]
            # torch's GroupNorm, not the blocks' one: the first stages of the committed results were trained with it,
            # bit for bit
            net += [nn.GroupNorm(math.gcd(outside, num_groups), outside), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*net, conv(width * min(2**layers, 8), 1, 4, padding=1))
        for m in self.net:
            if isinstance(m, conv):
                nn.init.normal_(m.weight, 0.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        return self.net(frames(image))


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Compute the discriminator's hinge loss from its logits for real and fake images (VQGAN eq. 5; Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, limit: float = MAX_ADAPTIVE_WEIGHT) -> Tensor:
    """Compute ||d rec / d w|| / ||d adv / d w||, at most `limit`, for the decoder's last layer w (VQGAN eq. 7)."""
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(0.0, limit).detach()
