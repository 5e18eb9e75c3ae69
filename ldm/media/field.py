"""Fields (C, L) or (C, H, W), physical states on a grid: the numbers in an .npz, a picture and the power spectrum."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import UserError
from ldm.io.images import colour, make_grid
from ldm.media.files import write_sample

IS_PICTURE = True
SIDE = 96  # pixels of a graph, and of a two-dimensional field at least
GAP = 4  # white pixels between panels
DECADES = 8  # of power that a spectrum shows below its largest value
# from -1 over 0 to 1: blue, white, red
COLOURS = torch.tensor(
    [[0.02, 0.19, 0.38], [0.26, 0.58, 0.76], [0.97, 0.97, 0.97], [0.84, 0.38, 0.30], [0.40, 0.00, 0.12]]
)


def write(stem: Path, sample: Tensor, metadata: Mapping[str, str]) -> list[Path]:
    """Write a field (C, L) or (C, H, W) as STEM.npz, with the arrays `field` float32 and `spectrum`, and STEM.png.

    The picture is `sheet` of this field, on its own scale.
    """
    buffer = BytesIO()
    np.savez_compressed(buffer, field=sample.float().cpu().numpy(), spectrum=power_spectrum(sample).numpy())
    return write_sample(stem, {".npz": buffer.getvalue()}, sheet([sample], 1), metadata)


def sheet(samples: Sequence[Tensor], columns: int) -> Tensor:
    """Draw fields (C, L) or (C, H, W), each channel with its power spectrum to the right, and arrange them in rows.

    A one-dimensional field is a graph; a two-dimensional one, such as space (W) over time (H), is coloured from blue
    over white at zero to red. All have one scale, that of the largest absolute value.
    Returns (3, H', W') in [-1, 1].  Raises UserError for values that are not finite.
    """
    fields = [sample.float().cpu() for sample in samples]
    if bad := sum(int((~field.isfinite()).sum()) for field in fields):
        raise UserError(f"field: {bad} values are not finite; the model that generated them has diverged")
    largest = max(float(field.abs().max()) for field in fields) or 1.0
    panels = torch.stack([_panel(field / largest) for field in fields])
    return make_grid((255 * panels).round().byte(), columns, gap=GAP).float() / 127.5 - 1


def fault(shape: Sequence[int]) -> str:
    """Return why samples of a shape are no fields, "" if they are."""
    return "" if len(shape) in (2, 3) else f"samples of shape {tuple(shape)} are no fields (C, L) or (C, H, W)"


def power_spectrum(field: Tensor) -> Tensor:
    """Return the power (C, L // 2 + 1) float64 of a field (C, ..., L) at the wavenumbers 0..L // 2 of its last axis.

    It is averaged over the axes between; its sum over the wavenumbers is the mean square of the channel.
    """
    length = field.shape[-1]
    power = torch.fft.rfft(field.double().cpu()).abs().square() / length**2
    power[..., 1 : (length + 1) // 2] *= 2  # these occur twice, as k and -k
    return power.flatten(1, -2).mean(1) if power.ndim > 2 else power


def _panel(field: Tensor) -> Tensor:
    """Draw the channels of a field in [-1, 1] below each other, (3, H', W') in [0, 1]."""
    powers = power_spectrum(field)[:, 1:].clamp_min(1e-300).log10()  # without the mean
    rows = []
    for values, power in zip(field, powers, strict=True):
        zoom = max(1, -(-SIDE // min(values.shape)))
        colours = (
            colour(values, COLOURS).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) if values.ndim == 2 else None
        )
        picture = _graph((values + 1) / 2, SIDE, max(SIDE, len(values))) if colours is None else colours
        top = power.max() if len(power) else power.new_zeros(())
        spectrum = _graph((1 + (power - top) / DECADES).clamp_min(0).float(), picture.shape[1], SIDE)
        white = picture.new_ones(3, picture.shape[1], GAP)
        rows.append(F.pad(torch.cat([picture, white, spectrum], 2), (0, 0, 0, GAP), value=1.0))
    return torch.cat(rows, 1)[:, :-GAP]


def _graph(values: Tensor, height: int, width: int) -> Tensor:
    """Draw the graph of values (N,) in [0, 1], dark on white: (3, height, width) in [0, 1]."""
    if not len(values):
        return values.new_ones(3, height, width)
    heights = F.interpolate(values[None, None], width, mode="linear", align_corners=True)[0, 0]
    rows = ((1 - heights) * (height - 1)).round()
    following = torch.cat([rows[1:], rows[-1:]])
    row = torch.arange(height)[:, None]
    line = (row >= torch.minimum(rows, following)) & (row <= torch.maximum(rows, following))
    return 1 - 0.8 * line.float().expand(3, -1, -1)
