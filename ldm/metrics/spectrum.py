"""Radially averaged power spectra of images, and how much of the fine structure a reconstruction retains."""

import torch
from torch import Tensor

from ldm.errors import ConfigError


def radial_power_spectrum(image: Tensor) -> Tensor:
    """Average the power of images (B, C, H, W) over channels and rings of equal frequency: (B, K).

    Ring k has the frequencies nearest to k / min(H, W) cycles per pixel, up to sqrt(1/2), that of a checkerboard.  The
    mean is subtracted, and a Hann window applied, because the jump between opposite borders would have power at every
    frequency.  The power of white noise is its variance, in every ring k > 1.  Raises ConfigError for sides below 4 px.
    """
    height, width = image.shape[-2:]
    side = min(height, width)
    if side < 4:
        raise ConfigError(f"images are {height}x{width}: a spectrum needs sides of 4 px or more")
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    options = {"dtype": image.dtype, "device": image.device}
    window = torch.hann_window(height, **options)[:, None] * torch.hann_window(width, **options)  # type: ignore[call-overload]
    power = torch.fft.fft2((image - image.mean((-2, -1), keepdim=True)) * window).abs().square()
    power = power.mean(1) / window.square().sum()  # (B, H, W)
    y, x = (torch.fft.fftfreq(n, **options) for n in (height, width))  # type: ignore[call-overload]
    ring = ((y[:, None].square() + x.square()).sqrt() * side).round().long().flatten()
    counts = ring.bincount()
    return power.new_zeros(len(image), len(counts)).index_add(1, ring, power.flatten(1)) / counts


def high_frequency_ratio(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Divide the reconstructions' power by the images', both at more than 1/4 cycle per pixel: ().

    1 for a perfect reconstruction, near 0 for blurred ones, above 1 for ones with noise or a grid.  Not finite if the
    images have no such power.
    """
    first = min(image.shape[-2:]) // 4 + 1
    rebuilt, original = (radial_power_spectrum(x)[:, first:].sum() for x in (reconstruction, image))
    return rebuilt / original
