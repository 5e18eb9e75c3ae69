"""A folder of clips, decoded once and cut into samples of equally many frames at one frame rate."""

import json
import os
from collections.abc import Sequence
from fractions import Fraction
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.captions import annotate, format_names
from ldm.data.clip_files import EXTENSIONS, DecodedClip, read_clip
from ldm.data.folder import File, scan, split_train_test
from ldm.data.image_cache import cached
from ldm.data.memory import InMemoryDataset, iter_bytes
from ldm.data.shape import format_size, parse_size
from ldm.errors import UserError
from ldm.io.progress import ProgressBar

READER = 1  # raise it when reading changes its result, so that clips decoded before are not used
EXPECTED = (
    "expected clips in it: in a subfolder for each class, or with captions beside them, or named by what they show"
)


class ClipFolder(InMemoryDataset):
    """The clips under `path`, cut into pieces of `frames` frames: image (channels, frames, H, W) in [-1, 1].

    Every frame is scaled and cropped at the centre. All clips of a folder are shown at one rate, so that motion keeps
    its speed; frames are counted and timed as they are decoded, whatever the file's header says.
    frames: 2 or more; shorter clips are left out and listed.  size: in pixels, one number or [height, width].
    channels: 3, or 1 for grey.  rate: frames per second, by default the median of the clips'.
    stride: frames from one piece of a clip to the next, by default `frames`: pieces do not overlap.
    captions: see ldm.data.captions.annotate; a clip's pieces share them.
    test_fraction: fraction of the clips in the test split, chosen by each file's name alone; if that leaves a split
    without a clip, both splits have all.
    max_unreadable: fraction of the files that may be unreadable or too short.
    content_hash: expected digest of frames and captions.
    Raises UserError naming the path.
    """

    medium = "clip"

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        frames: int = 16,
        size: int | Sequence[int] = 64,
        channels: int = 3,
        rate: float | None = None,
        stride: int | None = None,
        captions: str | Path | None = None,
        test_fraction: float = 0.02,
        max_unreadable: float = 0.2,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = False,
    ):
        if split not in ("train", "test"):
            raise UserError(f"split={split!r}: expected train or test")
        if channels not in (1, 3):
            raise UserError(f"channels={channels}: expected 3 for colour or 1 for grey")
        if frames < 2 or (stride is not None and stride < 1) or (rate is not None and not rate > 0):
            raise UserError(
                f"frames={frames} stride={stride} rate={rate}: expected 2 frames or more, and positive numbers"
            )
        if not 0 <= test_fraction < 1:
            raise UserError(f"test_fraction={test_fraction}: expected a fraction of at least 0 and below 1")
        height, width = parse_size(size, least=16)
        root = Path(path).expanduser()
        files = scan(root, EXTENSIONS, EXPECTED)
        shape = (channels, frames, height, width)
        exact = None if rate is None else Fraction(rate).limit_denominator(1001)
        key = (READER, shape, str(exact), stride, os.path.realpath(root), *map(tuple, files))
        images, found = cached("clips", key, lambda: decode_clips(root, files, shape, exact, stride or frames))
        self.skipped = found["skipped"]
        if len(self.skipped) > max_unreadable * len(files):
            raise UserError(
                f"path={root}: {len(self.skipped):,} of {len(files):,} clips cannot be used, "
                f"more than data.max_unreadable={max_unreadable}: {format_names(self.skipped)} "
                f"({next(iter(self.skipped.values()))}); repair or remove them, lower frames, or allow more"
            )
        names = [file.name for file in files if file.name not in self.skipped]
        annotations = annotate(root, names, captions)
        clips = torch.tensor(found["clips"])  # of each sample, its row in names
        self.held_out, rows = split_train_test(names, test_fraction)[split]
        chosen = torch.isin(clips, torch.tensor(rows)).nonzero()[:, 0]
        self.root, self.rate = root, float(Fraction(found["rate"]))
        super().__init__(
            f"clips-{split}",
            images,
            torch.tensor(annotations.labels)[clips[chosen]],
            annotations.classes,
            seed,
            flip,
            chosen,
            [annotations.texts[i] for i in clips[chosen].tolist()],
        )
        digest = sha256(json.dumps([list(map(list, annotations.texts)), list(annotations.labels), found]).encode())
        for part in iter_bytes(images):
            digest.update(part)
        self.content = digest.hexdigest()[:16]
        if content_hash not in (None, self.content):
            raise UserError(
                f"path={root}: its clips or captions are not those of this run (digest {self.content}, "
                f"then {content_hash}); put them back, or start a new run with its command"
            )
        notes = [f"{root}: {len(names):,} clips, {len(images):,} pieces of {frames} frames", *annotations.notes]
        notes += [f"{format_size((height, width))} px{'' if channels == 3 else ', grey'}"]
        notes += [f"{self.rate:g} frames a second", f"{self.held_out} clips held out"]
        first = next(iter(self.skipped.values()), "")
        notes += [f"{len(self.skipped):,} skipped: {format_names(self.skipped)} ({first})"] if self.skipped else []
        self.summary = ", ".join(notes)

    @property
    def resolved_config(self) -> dict[str, Any]:
        """Values of the options that a config left open; content_hash makes run names depend on clips and captions."""
        return {"rate": self.rate, "content_hash": self.content}


def decode_clips(
    root: Path, files: Sequence[File], shape: Sequence[int], rate: Fraction | None, stride: int
) -> tuple[Tensor, dict[str, Any]]:
    """Decode these files and cut them into pieces (N, C, F, H, W) uint8; all frames are in memory at once.

    shape: (C, F, H, W).  rate: frames per second, None for the median of the files'.
    Returns the pieces, and {"clips": each piece's row among the files that are used, "rate": text, "skipped": {name:
    fault}}.  Raises UserError if there is no piece.
    """
    channels, frames, height, width = shape
    bar, read, skipped = ProgressBar("reading", len(files), unit="clips"), {}, {}
    for count, file in enumerate(files, 1):
        try:
            read[file.name] = read_clip(root / file.name, (height, width), channels)
        except UserError:
            raise  # the package that decodes is not installed
        except Exception as error:  # FFmpeg and Pillow's plugins raise all kinds of exceptions on a broken file
            skipped[file.name] = " ".join(str(error).replace(str(root / file.name), "").split()) or repr(error)
        bar.update(count)
    rate = rate or median_rate(list(read.values()))
    pieces, clips, used = [], [], 0
    for name, clip in read.items():
        if len(clip.frames) < 2:
            skipped[name] = "a single frame"
            continue
        timed = clip.at_rate(rate)
        if len(timed) < frames:
            skipped[name] = f"{len(timed)} frames at {float(rate):g} a second, shorter than {frames}"
            continue
        starts = range(0, len(timed) - frames + 1, stride)
        pieces += [timed[start : start + frames].transpose(0, 1) for start in starts]
        clips += [used] * len(starts)
        used += 1
    if not pieces:
        name, fault = next(iter(skipped.items()))
        raise UserError(f"path={root}: none of {len(files):,} clips can be used; {format_names([name])}: {fault}")
    return torch.stack(pieces), {"clips": clips, "rate": str(rate), "skipped": skipped}


def median_rate(clips: Sequence[DecodedClip]) -> Fraction:
    """Return the median frame rate of the clips with two frames or more; 1 if there are none."""
    rates = sorted(clip.rate for clip in clips if clip.rate) or [Fraction(1)]
    return (rates[(len(rates) - 1) // 2] + rates[len(rates) // 2]) / 2
