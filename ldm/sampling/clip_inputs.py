"""The clips that a user gives to sample.py: video files, animated images, or pictures, each a clip of equal frames."""

from functools import partial
from pathlib import Path
from typing import cast

from torch import Tensor

from ldm.data.clip_files import EXTENSIONS, read_clip
from ldm.data.folder import EXTENSIONS as PICTURES
from ldm.errors import UserError
from ldm.sampling.inputs import InputFiles, InputSpec, open_image, open_input, resize_and_crop, to_tensor


def clip_input(spec: InputSpec, path: str | None, key: str = "image") -> InputFiles:
    """Return a reader of clips (C, F, H, W) in [-1, 1], scaled and center-cropped to the spec's size, [F, H, W].

    A longer clip gives its first F frames; a picture is repeated F times.  path: a file or a folder.  key: the option
    that gave it.
    Raises UserError for a model of images, and naming a file that cannot be read or is too short.
    """
    if len(spec.size) != 3:
        raise UserError(f"{key}={path}: this task is for models of clips, and the run draws {len(spec.size)} sides")
    return open_input(key, path, partial(read, spec, key), (*EXTENSIONS, *PICTURES))


def read(spec: InputSpec, key: str, file: Path) -> Tensor:
    """Read one file as `clip_input` does."""
    frames, height, width = cast(tuple[int, ...], spec.size)
    moving = file.suffix.lower() in EXTENSIONS
    try:
        clip = read_clip(file, (height, width), spec.channels).frames.transpose(0, 1) if moving else None
    except UserError:
        raise
    except Exception as error:  # FFmpeg and Pillow's plugins raise exceptions of many types for a broken file
        raise UserError(f"{key}={file} cannot be read as a clip: {' '.join(str(error).split())}") from None
    if clip is None:
        picture = open_image(key, file).convert("RGB" if spec.channels == 3 else "L")
        clip = to_tensor(resize_and_crop(picture, (height, width)))[:, None].byte()
    if clip.shape[1] == 1:
        clip = clip.expand(-1, frames, -1, -1)
    if clip.shape[1] < frames:
        raise UserError(f"{key}={file} has {clip.shape[1]} frames: expected {frames} or more, or a picture")
    return clip[:, :frames].float() / 127.5 - 1
