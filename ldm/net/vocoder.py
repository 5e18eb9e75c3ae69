"""A vocoder of Vocos's kind (Siuzdak 2023): ConvNeXt blocks at the frame rate, and an inverse Fourier transform."""

import torch
from torch import Tensor, nn

from ldm.media.stft import HOP, N_FFT, inverse_stft


class ConvNeXtBlock(nn.Module):
    """A residual block on x (B, dim, T): depthwise convolution over 7 frames, then an MLP for each frame.

    Liu et al. 2022, with the layer scale of its section 2 at `scale`.
    """

    def __init__(self, dim: int, hidden: int, scale: float):
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.scale = nn.Parameter(torch.full((dim,), scale))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).transpose(1, 2))
        return x + (self.scale * self.mlp(h)).transpose(1, 2)


class Vocoder(nn.Module):
    """Waves (B, HOP T) float32 of log-mel spectrograms (B, 1, bands, T) in [-1, 1], those of ldm.media.mel.

    The last layer gives the logarithm of the magnitude and the phase of each frequency; there is no upsampling, so no
    artefact of it.  width: channels.  hidden: channels within a block.
    """

    MAX_LOG_MAGNITUDE = 6.0  # a sine of amplitude 1 has ln 256 = 5.5 at its peak

    def __init__(self, bands: int = 128, width: int = 256, hidden: int = 768, depth: int = 6):
        super().__init__()
        self.stem = nn.Conv1d(bands, width, 7, padding=3)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(width, hidden, 1 / depth) for _ in range(depth)))
        self.last_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, N_FFT + 2)
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.constant_(module.get_parameter("bias"), 0.0)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.stem(image[:, 0]).transpose(1, 2)).transpose(1, 2)
        x = self.last_norm(self.blocks(x).transpose(1, 2))
        with torch.autocast(x.device.type, enabled=False):  # the transform has no type of 16 bits
            log_magnitude, phase = self.head(x.float()).transpose(1, 2).chunk(2, 1)  # (B, N_FFT / 2 + 1, T)
            magnitude = log_magnitude.clamp(max=self.MAX_LOG_MAGNITUDE).exp()
            return inverse_stft(torch.complex(magnitude * phase.cos(), magnitude * phase.sin()), HOP)
