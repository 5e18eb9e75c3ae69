"""Read the frames of a clip file (MP4, AVI, WebM, ..., GIF, WebP), counted by decoding and timed by their stamps."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data.decode import composite_alpha, open_image
from ldm.io.extras import extra

EXTENSIONS = (".mp4", ".avi", ".gif", ".webm", ".webp", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv")
PILLOW = (".gif", ".webp")  # whose pauses FFmpeg does not read, or which it cannot read at all
UNTIMED = Fraction(1, 25)  # seconds of a frame where a file has no times
LEAST_PAUSE = Fraction(1, 100)  # seconds; a GIF whose frames last 0 is shown at 10 frames a second by browsers
DEFAULT_PAUSE = Fraction(1, 10)


class DecodedClip(NamedTuple):
    """The frames (F, C, H, W) uint8 of a clip, and the time in seconds at which each is shown, ascending from 0.

    end: the time at which the last frame ends.
    """

    frames: Tensor
    times: Sequence[Fraction]
    end: Fraction

    @property
    def rate(self) -> Fraction:
        """Frames per second: one by the median time between two; 0 for a single frame."""
        gaps = [b - a for a, b in pairwise(self.times) if b > a]
        return 1 / median(gaps) if gaps else Fraction(0)

    def at_rate(self, rate: Fraction) -> Tensor:
        """Return the frames (N, C, H, W) that are shown at 0, 1 / rate, 2 / rate, ... seconds, before the end.

        A frame that lasts longer is repeated, one that lasts shorter may be left out: motion keeps its speed.
        """
        rows, row = [], 0
        for k in range(max(1, -(-self.end * rate // 1))):
            while row + 1 < len(self.times) and self.times[row + 1] * rate <= k:
                row += 1
            rows.append(row)
        return self.frames[rows]


def read_clip(path: Path, size: tuple[int, int], channels: int) -> DecodedClip:
    """Decode a clip, each frame scaled to cover size (height, width) and cropped at its centre.

    What the file's header says of frames and rate is not used.  channels: 3, or 1 for grey.
    Raises ValueError for a file without a frame, else what FFmpeg and Pillow raise; UserError without PyAV.
    """
    pictures = pillow_pictures(path) if path.suffix.lower() in PILLOW else av_pictures(path)
    frames, times, ends = [], [], []
    for picture, start, pause in pictures:
        frames.append(fit(picture, size, channels))
        times.append(start)
        ends.append(start + pause)
    if not frames:
        raise ValueError("no frame can be decoded")
    order = sorted(range(len(times)), key=times.__getitem__)  # stable: equal stamps stay in decoding order
    first = times[order[0]]
    return DecodedClip(torch.stack([frames[i] for i in order]), [times[i] - first for i in order], max(ends) - first)


def av_pictures(path: Path) -> Iterator[tuple[Any, Fraction, Fraction]]:
    """Yield the frames of the first video stream as Pillow images, with start and duration in seconds.

    A damaged part is left out, as players do: what was shown before it stays.
    """
    with extra("video", "reading clips"):
        import av

    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        pause = 1 / Fraction(stream.average_rate) if stream.average_rate else UNTIMED
        late = Fraction(0)  # where a frame without a stamp begins
        for frame in (frame for packet in container.demux(stream) for frame in decodable(packet)):
            start = late if frame.pts is None else frame.pts * Fraction(frame.time_base)
            length = frame.duration * Fraction(frame.time_base) if frame.duration else pause
            late = start + length
            yield frame.to_image(), start, length


def decodable(packet: Any) -> list[Any]:
    """Return the frames that a packet completes; none for a damaged one."""
    from av.error import InvalidDataError

    try:
        return packet.decode()
    except InvalidDataError:
        return []


def pillow_pictures(path: Path) -> Iterator[tuple[Any, Fraction, Fraction]]:
    """Yield the frames of an animated image, composited on white, with start and duration in seconds."""
    from PIL import ImageSequence

    start = Fraction(0)
    with open_image(path) as file:
        for picture in ImageSequence.Iterator(file):
            picture.load()
            pause = Fraction(picture.info.get("duration", 0)) / 1000
            pause = pause if pause >= LEAST_PAUSE else DEFAULT_PAUSE
            yield composite_alpha(picture.copy()), start, pause
            start += pause


def fit(picture: Any, size: tuple[int, int], channels: int) -> Tensor:
    """Scale a Pillow image to cover size (height, width) and crop its centre: (C, height, width) uint8."""
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.fit(picture.convert("RGB" if channels == 3 else "L"), size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(picture)).reshape(*size, channels).permute(2, 0, 1)
