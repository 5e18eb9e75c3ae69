"""The short-time Fourier transform of sounds, and its inverse: 1,024 samples a frame, 256 from frame to frame."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

N_FFT, HOP = 1024, 256  # samples
MARGIN = (N_FFT - HOP) // 2  # samples of reflection at each end, so that there are exactly L / HOP frames


@lru_cache(maxsize=8)
def hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the periodic Hann window (length,)."""
    return torch.hann_window(length, dtype=dtype, device=device)


def stft(wave: Tensor, n_fft: int = N_FFT, hop: int = HOP) -> Tensor:
    """Transform waves (B, L) to spectra (B, n_fft / 2 + 1, L / hop) complex, framed as by HiFi-GAN (Kong et al. 2020).

    The ends are reflected by (n_fft - hop) / 2 samples. L: a multiple of hop, longer than the reflected part.
    """
    margin = (n_fft - hop) // 2
    frames = F.pad(wave, (margin, margin), mode="reflect").unfold(1, n_fft, hop)
    return torch.fft.rfft(frames * hann(n_fft, wave.dtype, wave.device)).transpose(1, 2)


def inverse_stft(spectrum: Tensor, hop: int = HOP) -> Tensor:
    """Transform spectra (B, n_fft / 2 + 1, T) complex to waves (B, hop T) by least squares (Griffin & Lim 1984, eq. 6).

    The inverse of `stft`: overlapping frames are added under the window and divided by the sum of its squares.
    """
    frames = torch.fft.irfft(spectrum.transpose(1, 2)).transpose(1, 2)  # (B, n_fft, T)
    n_fft, count = frames.shape[1:]
    margin, window = (n_fft - hop) // 2, hann(n_fft, frames.dtype, frames.device)[:, None]
    size, steps = (1, hop * (count - 1) + n_fft), {"kernel_size": (1, n_fft), "stride": (1, hop)}
    added = F.fold(frames * window, size, **steps)[:, 0, 0]
    weight = F.fold(window.square().expand(1, n_fft, count), size, **steps)[:, 0, 0]
    return added[:, margin : size[1] - margin] / weight[:, margin : size[1] - margin]
