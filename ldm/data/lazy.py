"""Data sets larger than memory: images decoded on demand, with every random choice keyed by (epoch, index)."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import TEMPLATES
from ldm.data.decode import CROPS, centre_corner
from ldm.data.memory import flip_where
from ldm.data.quarantine import quarantined_rows
from ldm.data.shape import format_size, parse_size
from ldm.errors import UserError
from ldm.tensors import derive_seed

log = logging.getLogger(__name__)
MAX_CONSECUTIVE_FAILURES = 20  # unreadable images in a row before an error
MAX_UNREADABLE = 0.01  # fraction of the images that may turn out to be unreadable in training
MAX_QUARANTINED = 0.2  # fraction of the images that may be quarantined


class SampleSource(Protocol):
    """A source of samples 0..N-1.

    identity: text that changes when the samples do.  classes: {class: captions} of the labels.
    root: the path by which ldm.data.check knows the samples.
    captioned: whether samples have captions of their own, else they get those of their class.
    uncaptioned, unlabelled: (N,) bool, the samples that train the empty condition as they have no caption, and those
    without a label.
    """

    @property
    def root(self) -> str | Path: ...
    @property
    def identity(self) -> str: ...
    @property
    def classes(self) -> Mapping[str, Sequence[str]]: ...
    @property
    def captioned(self) -> bool: ...
    @property
    def uncaptioned(self) -> Tensor: ...
    @property
    def unlabelled(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def image(self, i: int) -> Path | BinaryIO: ...
    def texts(self, i: int) -> Sequence[str]: ...  # none: no caption
    def label(self, i: int) -> int: ...  # -1: no label
    def name(self, i: int) -> str: ...


class LazyDataset(Dataset):
    """The samples `rows` of a source, with the methods of an InMemoryDataset: image (channels, H, W) in [-1, 1].

    Each image is scaled and cropped at the centre; crop="adm" does it as ADM does, for its reference statistics. A
    sample is a function of (epoch, index) alone, for any number of workers and ranks. Without a caption it trains the
    empty condition, "". Images quarantined by ldm.data.check are left out; any other that cannot be read is replaced by
    the next readable one, until there are too many of them.
    content: expected digest of the files.
    Raises UserError naming what does not match.
    """

    def __init__(
        self,
        name: str,
        source: SampleSource,
        rows: Sequence[int],
        size: int | Sequence[int],
        channels: int,
        content: str | None,
        seed: int = 0,
        flip: bool = True,
        crop: str = "centre",
    ):
        if crop not in CROPS:
            raise UserError(f"crop={crop}: expected {' or '.join(CROPS)}")
        if channels not in (1, 3):
            raise UserError(f"channels={channels}: expected 3 for colour or 1 for grey")
        height, width = parse_size(size, least=16)
        if not len(rows):
            raise UserError(f"{name}: no sample in this split")
        faults = quarantined_rows(str(source.root))
        if faults:
            total, rows = len(rows), [row for row in rows if source.name(int(row)) not in faults]
            if len(rows) < (1 - MAX_QUARANTINED) * total:
                raise UserError(
                    f"{name}: {total - len(rows):,} of {total:,} images are quarantined, "
                    f"more than {MAX_QUARANTINED:.0%}; repair them"
                )
        self.unreadable: set[int] = set()
        self.name, self.source, self.rows, self.seed, self.flip = name, source, torch.as_tensor(rows), seed, flip
        self.shape, self.crop = (channels, height, width), crop
        self.classes, self.captions = list(source.classes), [list(texts) for texts in source.classes.values()]
        self.content = sha256((source.identity + (repr(sorted(faults)) if faults else "")).encode()).hexdigest()[:16]
        if content not in (None, self.content):
            raise UserError(f"{name}: its files are not those of this run (digest {self.content}, then {content})")
        self.uncaptioned, self.unlabelled = (
            int(mask[self.rows].sum()) for mask in (source.uncaptioned, source.unlabelled)
        )
        notes = [
            f"{name}: {len(self):,} of {len(source):,} samples",
            f"{len(self.classes):,} classes",
            f"{format_size((height, width))} px",
        ]
        notes += ["read as they are needed", *([f"{len(faults):,} quarantined"] if faults else [])]
        notes += [f"{self.uncaptioned:,} without a caption (the empty one stands for it)"] if self.uncaptioned else []
        notes += [f"{self.unlabelled:,} without a label"] if self.unlabelled else []
        self.summary = ", ".join(notes)

    @property
    def resolved_config(self) -> dict[str, str]:
        """content_hash makes the names of runs depend on the files."""
        return {"content_hash": self.content}

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the pixels, independent of the files' location."""
        parts = (
            self.source.identity,
            format_size(self.shape[1:]),
            self.shape[0],
            self.rows.tolist(),
            *([] if self.crop == "centre" else [self.crop]),
        )
        return f"{type(self).__name__.lower()}-{sha256(repr(parts).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        """Return one sample of the first epoch: image, caption, label, index."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, index {index} is out of range")
        batch = self.batch([(0, index % len(self))])
        return {
            "image": batch["image"][0],
            "caption": batch["caption"][0],
            "label": int(batch["label"][0]),
            "index": batch["index"][0],
        }

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return the samples, (epoch, index) pairs: `batch_metadata`, image (B, C, H, W) float32 in [-1, 1], and sizes.

        The sizes are (B, 2) int64, height first, in pixels: `original_size`, of the file's image; `crop`, the corner of
        the sample in that image once it is scaled; `target_size`, of the sample.
        """
        batch = self.batch_metadata(samples)
        images, originals = zip(*(self.decode(i) for i in batch["index"]), strict=True)
        sizes = torch.tensor(originals)
        return {
            "image": flip_where(to_unit(images), batch["flip"]),
            **batch,
            "original_size": sizes,
            "crop": centre_corner(sizes, *self.shape[1:]),
            "target_size": torch.tensor(self.shape[1:]).repeat(len(sizes), 1),
        }

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Return images (B, C, H, W) float32 in [-1, 1], never flipped."""
        return to_unit([self.decode(int(i))[0] for i in index])

    def decode(self, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Decode an image (C, H, W) uint8, or the next readable one; return it and its file's (height, width).

        Raises UserError if none of the next ones can be read.
        """
        for position in range(index, index + min(MAX_CONSECUTIVE_FAILURES, len(self))):
            row = int(self.rows[position % len(self)])
            try:
                channels, height, width = self.shape
                return CROPS[self.crop](self.source.image(row), height, width, channels)
            except Exception as error:  # Pillow's plugins raise all kinds of exceptions on a broken file
                if row not in self.unreadable:
                    self.unreadable.add(row)
                    reason = " ".join(str(error).split())
                    log.warning("%s cannot be read (%s); the next image stands for it", self.source.name(row), reason)
                if len(self.unreadable) > max(MAX_CONSECUTIVE_FAILURES, MAX_UNREADABLE * len(self)):
                    raise UserError(
                        f"{self.name}: {len(self.unreadable)} of {len(self):,} images could not be read so far, "
                        f"the last is {self.source.name(row)}; "
                        f"`python -m ldm.data.check {self.source.root}` finds and quarantines them all"
                    ) from None
        raise UserError(
            f"{self.name}: {MAX_CONSECUTIVE_FAILURES} images in a row cannot be read, "
            f"from {self.source.name(int(self.rows[index]))} on"
        )

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its images: label (B,) int64, flip (B,) bool, and lists caption, index and epoch."""
        index = [i for _, i in samples]
        return {
            "caption": [self.caption(epoch, i) for epoch, i in samples],
            "label": torch.tensor([self.source.label(int(self.rows[i])) for i in index], dtype=torch.long),
            "flip": torch.tensor(
                [self.flip and bool(derive_seed(self.seed, "flip", epoch, i) & 1) for epoch, i in samples],
                dtype=torch.bool,
            ),
            "index": index,
            "epoch": [epoch for epoch, _ in samples],
        }

    def all_captions(self) -> list[str]:
        """Return every caption that a sample may have, without repetitions."""
        rows = self.rows.tolist()
        by_sample = map(self.source.texts, rows) if self.source.captioned else self.captions
        return list(dict.fromkeys(text for texts in by_sample for text in texts))

    def caption(self, epoch: int, index: int) -> str:
        """Return the caption of a sample in an epoch, "" without one."""
        row = int(self.rows[index])
        label = self.source.label(row)
        texts = self.source.texts(row) if self.source.captioned else self.captions[label] if label >= 0 else ()
        return texts[derive_seed(self.seed, "caption", epoch, index) % len(texts)] if texts else ""


def to_unit(images: Sequence[Tensor]) -> Tensor:
    """Stack images (C, H, W) uint8 to (B, C, H, W) float32 in [-1, 1]."""
    return torch.stack(list(images)).float().div_(127.5).sub_(1)


def class_captions(classes: Sequence[str]) -> dict[str, list[str]]:
    """Return {class: captions} for class names, by templates."""
    return {name: [text.format(name.replace("_", " ")) for text in TEMPLATES] for name in classes}


def split_rows(keys: Sequence[int], held_out: float, split: str) -> list[int]:
    """Return the rows of a split, chosen by their 63-bit keys alone, independently of the other rows."""
    if split not in ("train", "test"):
        raise UserError(f"split={split!r}: expected train or test")
    return [i for i, key in enumerate(keys) if (key < held_out * 2**63) == (split == "test")]
