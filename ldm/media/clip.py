"""Clips (C, F, H, W) of F frames: an MP4 that browsers play, a GIF, and a contact sheet with a row for each clip."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ldm.io.extras import extra
from ldm.io.images import COLOUR_CHANNELS, make_grid, to_uint8
from ldm.media.files import write_sample

RATE = 8  # frames per second, of a data set that names no `rate`
SHEET_FRAMES = 8  # frames of a clip in a contact sheet, at most
CRF = 18  # of H.264: visually lossless
MAX_DENOMINATOR = 1001  # of a rate: 30000/1001 is that of television; MP4 cannot hold arbitrary fractions

with extra("video", "medium=clip"):
    import av


def write(stem: Path, sample: Tensor, metadata: Mapping[str, str]) -> list[Path]:
    """Write a clip (C, F, H, W) in [-1, 1], C = 1 or 3, as STEM.mp4, STEM.gif and the contact sheet STEM.png.

    metadata: its value `rate`, if there is one, is the number of frames per second.
    """
    frames, rate = to_frames(sample), Fraction(metadata.get("rate", RATE)).limit_denominator(MAX_DENOMINATOR)
    contents = {".mp4": encode_mp4(frames, rate), ".gif": encode_gif(frames, rate)}
    return write_sample(stem, contents, sheet([sample], 1), metadata)


def sheet(samples: Sequence[Tensor], columns: int) -> Tensor:
    """Arrange frames of clips (C, F, H, W) in [-1, 1], spread over each from first to last, one row per clip.

    Returns (3, H', W') in [-1, 1]. columns: not used, since a clip fills a row.
    """
    clips = [to_frames(sample) for sample in samples]
    count = min(SHEET_FRAMES, len(clips[0]))
    some = [round(k * (len(clips[0]) - 1) / max(1, count - 1)) for k in range(count)]
    return make_grid(torch.cat([clip[some] for clip in clips]), count).float() / 127.5 - 1


def fault(shape: Sequence[int]) -> str:
    """Return why samples of a shape are no clips, "" if they are."""
    if len(shape) == 4 and shape[0] in COLOUR_CHANNELS:
        return ""
    channels = " or ".join(map(str, COLOUR_CHANNELS))
    return f"samples of shape {tuple(shape)} are no clips (C, F, H, W) of {channels} channels"


def to_frames(sample: Tensor) -> Tensor:
    """Quantise a clip (C, F, H, W) in [-1, 1], C = 1 or 3, to frames (F, 3, H, W) uint8."""
    return to_uint8(sample.transpose(0, 1)).cpu().expand(-1, 3, -1, -1).contiguous()


def encode_mp4(frames: Tensor, rate: Fraction) -> bytes:
    """Encode frames (F, 3, H, W) uint8 as H.264 in yuv420p, which browsers play.

    Colours are not exact in it. It has even sides only: an odd one gets its last row or column once more.
    rate: frames per second.
    """
    height, width = frames.shape[2:]
    padded = torch.nn.functional.pad(frames.float(), (0, width % 2, 0, height % 2), mode="replicate").byte()
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(CRF)})
        stream.width, stream.height, stream.pix_fmt = padded.shape[3], padded.shape[2], "yuv420p"
        for frame in padded.permute(0, 2, 3, 1).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # the frames that the encoder holds back, which may be all
    return buffer.getvalue()


def encode_gif(frames: Tensor, rate: Fraction) -> bytes:
    """Encode frames (F, 3, H, W) uint8 as a looping GIF of F / rate seconds, rounded to its unit of 10 ms.

    Pillow makes equal frames in succession one frame that lasts as long as they do.
    rate: frames per second.
    """
    from PIL import Image

    images = [Image.fromarray(frame).quantize(256) for frame in frames.permute(0, 2, 3, 1).numpy()]
    buffer = BytesIO()
    durations = frame_durations(len(images), rate)
    images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)
    return buffer.getvalue()


def frame_durations(count: int, rate: Fraction) -> list[int]:
    """Return the milliseconds of each frame of a GIF, multiples of 10 that add up to the time at the end of each."""
    ends = [round(100 * k / rate) for k in range(count + 1)]
    return [10 * (end - start) for start, end in pairwise(ends)]
