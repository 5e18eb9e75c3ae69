"""Matplotlib figures measured in pixels: the fonts, colours and frames that all figures share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

INK, SOFT, PALE = "#222222", "#767676", "#d8d8d8"
# a palette that the colour-blind can distinguish (Okabe & Ito 2008)
BLUE, RED, GREEN, YELLOW = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY = "#CC79A7", "#56B4E9"
DPI = 100
POINT = 72 / DPI  # points per pixel


def canvas(width: int, height: int) -> Any:
    """Create a white matplotlib Figure; width and height in pixels. Raises UserError if matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: pip install -e '.[pictures]'") from None
    figure = Figure((width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def frame(figure: Any) -> "Tensor":
    """Render the figure: (H, W, 3) uint8."""
    import torch

    figure.canvas.draw()
    return (
        torch.frombuffer(bytearray(figure.canvas.buffer_rgba()), dtype=torch.uint8)
        .reshape(*_size(figure), 4)[..., :3]
        .clone()
    )


def panel(
    figure: Any,
    left: float,
    top: float,
    width: float,
    height: float,
    title: str = "",
    x: str = "",
    y: str = "",
    **kind: Any,
) -> Any:
    """Add axes with two spines at (left, top), in pixels from the upper left corner; x and y are axis labels."""
    high, wide = _size(figure)
    axes = figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high), **kind)
    axes.set_title(title, fontsize=13 * POINT, color=INK, pad=4)
    axes.set_xlabel(x, fontsize=12 * POINT, color=INK, labelpad=2)
    axes.set_ylabel(y, fontsize=12 * POINT, color=INK, labelpad=2)
    axes.tick_params(labelsize=11 * POINT, colors=SOFT, length=2, width=0.6, pad=2)
    for name, spine in axes.spines.items():
        spine.set(visible=name in ("left", "bottom"), color=SOFT, linewidth=0.6)
    return axes


def hide_axes(axes: Any) -> Any:
    """Remove ticks and spines from axes; return the axes."""
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def image(figure: Any, pixels: "Tensor", left: int, top: int, zoom: int = 1, title: str = "") -> Any:
    """Draw an image (C, H, W) in [-1, 1], magnified `zoom` times, at (left, top) from the upper left corner.

    Each pixel becomes zoom x zoom pixels; an image within axes can be off by a row, up to matplotlib 3.10.
    """
    height, width = (zoom * side for side in pixels.shape[-2:])
    axes = hide_axes(panel(figure, left, top, width, height, title))
    axes.patch.set_visible(False)  # it is in front of the figure's images
    shown = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().expand(3, -1, -1).permute(1, 2, 0).cpu()
    magnified = shown.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    figure.figimage(magnified.numpy(), left, _size(figure)[0] - top - height, origin="upper")
    return axes


def words(figure: Any, text: str, left: float, top: float, colour: str = INK, size: float = 12, **options: Any) -> Any:
    """Write text with its upper left corner, or the anchor set by ha= and va=, at (left, top) in pixels."""
    high, wide = _size(figure)
    options = {"ha": "left", "va": "top"} | options
    return figure.text(left / wide, 1 - top / high, text, fontsize=size * POINT, color=colour, **options)


def concatenate(images: "Tensor", columns: int, gap: int = 1) -> "Tensor":
    """Arrange images (N, C, H, W) in [-1, 1] in rows on white: (C, H', W')."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    out = images.new_ones(c, rows * (h + gap) - gap, columns * (w + gap) - gap)
    for i, tile in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        out[:, top : top + h, left : left + w] = tile
    return out


def stack_rows(rows: "Mapping[str, Tensor]", columns: int, left: int = 110) -> Any:
    """Create a figure with a row for each name: `columns` of its images (N, C, H, W) in [-1, 1], evenly spaced.

    All images have the same height; gaps are 2 pixels.
    """
    shown = {
        name: concatenate(images[:: len(images) // columns][:columns], columns, 2) for name, images in rows.items()
    }
    height, width = next(iter(shown.values())).shape[-2:]
    figure = canvas(left + width, len(shown) * (height + 2))
    for i, (name, strip) in enumerate(shown.items()):
        words(figure, name.replace(", ", ",\n"), left - 6, (i + 0.5) * (height + 2), size=10, ha="right", va="center")
        image(figure, strip, left, i * (height + 2))
    return figure


def cut(text: str, most: int) -> str:
    """Shorten text in its middle if it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]} … {text[-(most // 2 - 1) :]}"


def columns_of(n: int) -> int:
    """Return the number of columns of an approximately square sheet of n images."""
    return max(1, round(n**0.5))


def legend(axes: Any, names: Sequence[str] | None = None, **options: Any) -> None:
    """Add a legend without a frame."""
    axes.legend(
        *([] if names is None else [names]), frameon=False, fontsize=11 * POINT, **({"handlelength": 1.4} | options)
    )


def _size(figure: Any) -> tuple[int, int]:
    width, height = figure.canvas.get_width_height()
    return height, width
