"""The judge of notes."""

import torch
from torch import Tensor, nn

from ldm.metrics.features import require_uint8
from ldm.metrics.judge import Judge, conv_layers, feature_layers


class NoteNet(Judge):
    """The judge of log-mel spectrograms (B, 1, 128, T) uint8 of data=notes; `fd_notes`.

    It is trained on the family of the instrument, `label`, and MIDI's pitch together.
    """

    name = "notes"

    def __init__(self, width: int = 24, num_features: int = 128, num_classes: int = 12, num_pitches: int = 128):
        body = nn.Sequential(
            nn.Conv2d(1, width, (5, 4), (1, 4), (2, 0), bias=False),  # (B, w, 128, T/4): pitch is in the fine bands
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.MaxPool2d((1, 2)),  # (B, w, 128, T/8)
            *conv_layers(width, 2 * width),
            nn.MaxPool2d((2, 2)),  # (B, 2w, 64, T/16)
            *conv_layers(2 * width, 4 * width),
            nn.MaxPool2d((2, 1)),  # (B, 4w, 32, T/16)
            nn.AdaptiveAvgPool2d((32, 2)),
            *feature_layers(256 * width, num_features),
        )
        super().__init__(body, num_features, {"label": num_classes, "pitch": num_pitches})

    def penultimate(self, images: Tensor) -> Tensor:
        """Return features (B, num_features) before standardisation of spectrograms (B, 1, 128, T) uint8."""
        require_uint8(images, (1,), None)
        x = (images.to(self.mean.dtype) - 56) / 46  # mean and standard deviation of the training spectrograms
        return self.body(x.contiguous(memory_format=torch.channels_last))
