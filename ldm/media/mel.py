"""Sounds as log-mel spectrograms in [-1, 1], which a first stage encodes as images, and back by Griffin and Lim.

One layout for all sounds: 16 kHz, one channel, 128 bands up to 8 kHz, 62.5 frames a second. 64 bands, usual for speech,
lose the pitch of low notes.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from ldm.media.stft import N_FFT, inverse_stft, stft
from ldm.tensors import at_least_float32

RATE = 16_000  # samples per second
BANDS = 128
FLOOR, CEILING = math.log(1e-5), 3.0  # nats that become -1 and 1; a sine of amplitude 1 reaches 2.7
ROUNDS, MOMENTUM = 32, 0.99  # of Griffin and Lim's iteration


def slaney_mel(hertz: Tensor) -> Tensor:
    """Convert frequencies in Hz to mel, linear up to 1 kHz, then logarithmic (Slaney 1998, Auditory Toolbox)."""
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * (hertz.clamp_min(1) / 1000).log() / math.log(6.4))


def slaney_hertz(mel: Tensor) -> Tensor:
    """Convert mel to frequencies in Hz; the inverse of `slaney_mel`."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))


@lru_cache(maxsize=4)
def filterbank(bands: int = BANDS, n_fft: int = N_FFT, rate: int = RATE) -> Tensor:
    """Return weights (bands, n_fft / 2 + 1) float64 of triangular filters from 0 to rate / 2, of area 1 each (Slaney).

    Raises ValueError if a filter is so narrow that no frequency falls into it: its band would be constant.
    """
    top = slaney_mel(torch.tensor(rate / 2, dtype=torch.float64))
    edges = slaney_hertz(torch.linspace(0, float(top), bands + 2, dtype=torch.float64))
    low, centre, high = (edges[i : bands + i, None] for i in range(3))
    hertz = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    weights = torch.minimum(rising, falling).clamp_min(0) * 2 / (high - low)
    if empty := int((weights.sum(1) == 0).sum()):
        raise ValueError(
            f"{empty} of {bands} filters are empty at n_fft={n_fft}: expected fewer bands, or a larger n_fft"
        )
    return weights


def log_mel(wave: Tensor) -> Tensor:
    """Return the log-mel spectrograms (B, 1, BANDS, L / HOP) in [-1, 1] of waves (B, L), L a multiple of HOP.

    Band 0 is the lowest. ln(max(mel magnitude, 1e-5)) is mapped linearly from [FLOOR, CEILING]; nothing is normalised,
    so that loud and soft stay apart, and silence is -1.
    """
    with torch.autocast(wave.device.type, enabled=False):
        magnitude = stft(wave.to(at_least_float32(wave.dtype))).abs()
        mel = filterbank().to(magnitude) @ magnitude
        return to_unit(mel.clamp_min(1e-5).log())[:, None].clamp(-1, 1)


def to_unit(nats: Tensor) -> Tensor:
    """Map [FLOOR, CEILING] linearly to [-1, 1]."""
    return (nats - FLOOR) * 2 / (CEILING - FLOOR) - 1


def to_nats(image: Tensor) -> Tensor:
    """Map [-1, 1] linearly to [FLOOR, CEILING], values beyond to its ends."""
    return (image.clamp(-1, 1) + 1) / 2 * (CEILING - FLOOR) + FLOOR


def to_magnitude(image: Tensor) -> Tensor:
    """Estimate magnitudes (B, N_FFT / 2 + 1, T) of log-mel spectrograms (B, 1, BANDS, T) by least squares."""
    mel = to_nats(image[:, 0]).exp() * (image[:, 0] > -1)  # the floor is silence, not a hiss
    return (_inverse_filterbank().to(mel) @ mel).clamp_min(0)


@lru_cache(maxsize=1)
def _inverse_filterbank() -> Tensor:
    return torch.linalg.pinv(filterbank())


def griffin_lim(image: Tensor, rounds: int = ROUNDS, momentum: float = MOMENTUM) -> Tensor:
    """Return waves (B, HOP T) of log-mel spectrograms (B, 1, BANDS, T) in [-1, 1]; needs no training.

    Each round takes the phases of the spectrum of the wave that the last one gave (Griffin & Lim 1984), extrapolated
    from the round before by `momentum` (Perraudin et al. 2013, algorithm 2). The first phases are random, always the
    same ones.
    """
    with torch.autocast(image.device.type, enabled=False):
        return with_phase(to_magnitude(image.to(at_least_float32(image.dtype))), rounds, momentum)


def with_phase(magnitude: Tensor, rounds: int = ROUNDS, momentum: float = MOMENTUM) -> Tensor:
    """Return waves (B, HOP T) whose spectra have about these magnitudes (B, N_FFT / 2 + 1, T); see `griffin_lim`."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.rand(magnitude.shape[1:], generator=generator, dtype=torch.float64)
    spectrum = torch.polar(magnitude, angle.to(magnitude).expand_as(magnitude))
    before = torch.zeros_like(spectrum)
    for _ in range(rounds):
        consistent = stft(inverse_stft(spectrum))
        ahead = consistent + momentum * (consistent - before)
        spectrum = torch.polar(magnitude, ahead.angle())
        before = consistent
    return inverse_stft(spectrum)
