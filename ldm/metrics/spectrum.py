"""Radially averaged power spectra of images, and how much of the fine structure a reconstruction retains."""

from functools import reduce

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.tensors import frames


def radial_power_spectrum(image: Tensor) -> Tensor:
    """Average the power of images (B, C, H, W), or of (B, C, L), over channels and rings of equal frequency: (B, K).

    Ring k has the frequencies nearest to k / min(H, W) cycles per pixel, up to sqrt(1/2), that of a checkerboard.  The
    mean is subtracted, and a Hann window applied, because the jump between opposite borders would have power at every
    frequency.  The power of white noise is its variance, in every ring k > 1.  Raises ConfigError for sides below 4 px.
    """
    sides = image.shape[2:]
    if min(sides) < 4:
        raise ConfigError(f"images are {'x'.join(map(str, sides))}: a spectrum needs sides of 4 px or more")
    image = image.to(torch.promote_types(image.dtype, torch.float32))
    options = {"dtype": image.dtype, "device": image.device}
    axes = tuple(range(-len(sides), 0))
    windows = torch.meshgrid(*(torch.hann_window(n, **options) for n in sides), indexing="ij")  # type: ignore[call-overload]
    window = reduce(torch.mul, windows)
    power = torch.fft.fftn((image - image.mean(axes, keepdim=True)) * window, dim=axes).abs().square()
    power = power.mean(1) / window.square().sum()  # (B, H, W)
    frequencies = torch.meshgrid(*(torch.fft.fftfreq(n, **options) for n in sides), indexing="ij")  # type: ignore[call-overload]
    ring = (reduce(torch.add, [f.square() for f in frequencies]).sqrt() * min(sides)).round().long().flatten()
    counts = ring.bincount()
    return power.new_zeros(len(image), len(counts)).index_add(1, ring, power.flatten(1)) / counts


def high_frequency_ratio(reconstruction: Tensor, image: Tensor) -> Tensor:
    """Divide the reconstructions' power by the images', both at more than 1/4 cycle per pixel: ().

    1 for a perfect reconstruction, near 0 for blurred ones, above 1 for ones with noise or a grid.  Not finite if the
    images have no such power.  Of clips, it is that of their frames.
    """
    reconstruction, image = frames(reconstruction), frames(image)
    first = min(image.shape[2:]) // 4 + 1
    rebuilt, original = (radial_power_spectrum(x)[:, first:].sum() for x in (reconstruction, image))
    return rebuilt / original
