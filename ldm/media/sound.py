"""Sounds as log-mel spectrograms (1, BANDS, T) in [-1, 1]: a WAV file of 16 bits, and a picture of the spectrogram."""

import wave
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from ldm.io.images import colour, make_grid
from ldm.media.files import write_sample
from ldm.media.mel import BANDS, RATE, griffin_lim

GAP = 4  # white pixels between spectrograms
# from silence to loud: black, violet, red, orange, pale yellow
COLOURS = torch.tensor(
    [[0.00, 0.00, 0.02], [0.33, 0.06, 0.43], [0.73, 0.21, 0.33], [0.98, 0.55, 0.04], [0.99, 1.00, 0.64]]
)

Vocoder = Callable[[Tensor], Tensor]  # log-mel spectrograms (B, 1, BANDS, T) in [-1, 1] -> waves (B, HOP T)


def write(stem: Path, sample: Tensor, metadata: Mapping[str, str], vocoder: Vocoder = griffin_lim) -> list[Path]:
    """Write a sound (1, BANDS, T) as STEM.wav, 16 bits at RATE, and its spectrogram STEM.png.

    The peak is kept, never normalised: what is beyond full scale is clipped.
    """
    with torch.no_grad():
        samples = vocoder(sample[None].float().cpu().clamp(-1, 1))[0]
    return write_sample(stem, {".wav": encode_wav(samples)}, sheet([sample], 1), metadata)


def sheet(samples: Sequence[Tensor], columns: int) -> Tensor:
    """Arrange spectrograms (1, BANDS, T) row by row, low frequencies at the bottom: (3, H', W') in [-1, 1]."""
    pictures = torch.stack([colour(sample.float().cpu()[0].flip(0), COLOURS) for sample in samples])
    return make_grid((255 * pictures).round().byte(), columns, gap=GAP).float() / 127.5 - 1


def fault(shape: Sequence[int]) -> str:
    """Return why samples of a shape are no sounds, "" if they are."""
    if len(shape) == 3 and tuple(shape[:2]) == (1, BANDS):
        return ""
    return f"samples of shape {tuple(shape)} are no log-mel spectrograms (1, {BANDS}, T)"


def encode_wav(samples: Tensor) -> bytes:
    """Encode samples (L,) of amplitude 1 as a WAV file of 16 bits, one channel, at RATE; values beyond are clipped."""
    whole = (samples.double() * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
    buffer = BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, RATE, len(whole), "NONE", ""))
        file.writeframes(whole.numpy().astype("<i2").tobytes())
    return buffer.getvalue()
