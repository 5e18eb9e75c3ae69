"""Write frames to one file: GIF by Pillow, MP4 by imageio's ffmpeg, PNG of one frame or of several side by side."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.io import atomic

PNG_FRAMES = 6  # frames shown in the PNG of an animation


@dataclass(frozen=True)
class Animation:
    """`count` frames (H, W, 3) uint8, generated lazily; an animation with one frame is a figure.

    seconds: duration of each frame.  hold: duration of the last frame.  colours: size of the GIF's palette, shared by
        all
    frames.
    """

    frames: Iterable[Tensor]
    count: int
    seconds: float = 0.08
    hold: float = 2.0
    colours: int = 64


def gif(path: Path, film: Animation, frames: Sequence[Tensor]) -> None:
    """Write a looping GIF with one palette and no dithering, which would flicker and enlarge the file."""
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in frames]
    some = torch.cat([frames[i] for i in sorted({0, len(frames) // 3, 2 * len(frames) // 3, len(frames) - 1})])
    palette = Image.new("P", (1, 1))
    palette.putpalette(colours_of(some, film.colours))
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    times = [round(1000 * film.seconds)] * (len(images) - 1) + [round(1000 * film.hold)]
    buffer = BytesIO()
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)
    atomic.write_bytes(path, buffer.getvalue())


def colours_of(pixels: Tensor, most: int) -> bytes:
    """Return a palette of pixels (H, W, 3) uint8: one half the most common colours, the other spread over the rest."""
    from PIL import Image

    flat, count = pixels.reshape(-1, 3).unique(dim=0, return_counts=True)
    common = flat[count.argsort(descending=True, stable=True)[: most // 2]]
    spread = Image.fromarray(pixels.numpy()).quantize(
        most - len(common), Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
    )
    return bytes(common.flatten().tolist()) + bytes(spread.getpalette() or [])[: 3 * (most - len(common))]


def mp4(path: Path, film: Animation, frames: Sequence[Tensor]) -> None:
    """Write an H.264 file.

    Width and height are cropped to even numbers, as H.264 requires, and the last frame is repeated for `hold` seconds.
    """
    from imageio import mimwrite

    even = [frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2].numpy() for frame in frames]
    even += even[-1:] * round(film.hold / film.seconds)
    temporary = path.with_name(f".{path.name}.tmp.mp4")
    try:
        mimwrite(temporary, even, format="FFMPEG", fps=1 / film.seconds, macro_block_size=2)
        atomic.write_bytes(path, temporary.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)


def png(path: Path, film: Animation, frames: Sequence[Tensor]) -> None:
    """Write the frame, or PNG_FRAMES frames of an animation including the first and last, two per row."""
    from ldm.io.images import make_grid, save_png

    selected = (
        [frames[round(i * (len(frames) - 1) / (PNG_FRAMES - 1))] for i in range(PNG_FRAMES)]
        if len(frames) > 1
        else list(frames)
    )
    images = torch.stack(selected).permute(0, 3, 1, 2)
    save_png(path, make_grid(images, 2, gap=4) if len(selected) > 1 else images[0])


ENDINGS: dict[str, Callable[[Path, Animation, Sequence[Tensor]], None]] = {".gif": gif, ".mp4": mp4, ".png": png}


def writer(path: Path) -> Callable[[Path, Animation, Sequence[Tensor]], None]:
    """Return the function that writes a file of this name.

    Raises UserError for another extension, and for MP4 if imageio's ffmpeg is missing.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"out={path}: expected a name that ends in {', '.join(ENDINGS)}")
    if path.suffix == ".mp4":
        try:
            import imageio_ffmpeg
            from imageio import mimwrite  # noqa: F401

            imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError):
            raise UserError(
                f"out={path}: MP4 needs imageio with its ffmpeg: pip install 'imageio[ffmpeg]', or write a .gif"
            ) from None
    return ENDINGS[path.suffix]


def write(path: Path, film: Animation, on_frame: Callable[[int], Any] = lambda done: None) -> None:
    """Generate the frames and write them atomically; on_frame(done) is called after each.  Raises as `writer` does."""
    save, frames = writer(path), []
    for frame in film.frames:
        frames.append(frame)
        on_frame(len(frames))
    save(path, film, frames)
