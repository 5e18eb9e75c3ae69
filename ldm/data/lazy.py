"""Data sets larger than memory: images decoded as they are asked for, every random choice keyed by (pass, index)."""

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
from ldm.data.decode import CROPS
from ldm.data.memory import flip_where
from ldm.data.quarantine import quarantined_rows
from ldm.errors import UserError
from ldm.tensors import derive_seed

log = logging.getLogger(__name__)
MAX_CONSECUTIVE_FAILURES = 20  # images in a row of which one must be readable
UNKNOWN = 0.01  # the part that may turn out unreadable in training
KNOWN = 0.2  # and the part that may be quarantined


class SampleSource(Protocol):
    """Where samples 0..N-1 are. identity: text that changes when they do. classes: {class: captions} of the labels.

    place: the path by which ldm.data.check knows them.  captioned: whether samples have captions of their own, else the class's are theirs.
    uncaptioned, unlabelled: (N,) bool, which train the empty condition for want of a caption, and which have no label.
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
    """The samples `rows` of a source as a data set, with the methods of an InMemoryDataset: image (channels, size, size) in [-1, 1].

    Each image is scaled and cropped at the centre; crop: adm as ADM does it, for its reference statistics.  A sample is a function of
    (pass, index) alone, for any number of workers and ranks.  Without a caption it trains the empty condition, "".
    What ldm.data.check has quarantined is left out, and in the place of another that cannot be read stands the next that can, until they
    are too many.  content: the digest of the files that are expected.
    Raises UserError naming what does not fit.
    """

    def __init__(
        self,
        name: str,
        source: SampleSource,
        rows: Sequence[int],
        size: int,
        channels: int,
        content: str | None,
        seed: int = 0,
        flip: bool = True,
        crop: str = "centre",
    ):
        if crop not in CROPS:
            raise UserError(f"crop={crop}: expected {' or '.join(CROPS)}")
        if channels not in (1, 3) or size < 16:
            raise UserError(
                f"size={size} channels={channels}: expected 16 pixels or more, and 3 channels for colour or 1 for grey"
            )
        if not len(rows):
            raise UserError(f"{name}: no sample in this split")
        faults = quarantined_rows(str(source.root))
        if faults:
            every, rows = len(rows), [row for row in rows if source.name(int(row)) not in faults]
            if len(rows) < (1 - KNOWN) * every:
                raise UserError(
                    f"{name}: {every - len(rows):,} of {every:,} images are quarantined, more than {KNOWN:.0%}; mend them"
                )
        self.unreadable: set[int] = set()
        self.name, self.source, self.rows, self.seed, self.flip = name, source, torch.as_tensor(rows), seed, flip
        self.size, self.channels, self.crop = size, channels, crop
        self.classes, self.captions = list(source.classes), [list(texts) for texts in source.classes.values()]
        self.content = sha256((source.identity + (repr(sorted(faults)) if faults else "")).encode()).hexdigest()[:16]
        if content not in (None, self.content):
            raise UserError(
                f"{name}: its files are not those that this run was made with (digest {self.content}, then {content})"
            )
        self.uncaptioned, self.unlabelled = (
            int(one[self.rows].sum()) for one in (source.uncaptioned, source.unlabelled)
        )
        self.summary = (
            (
                f"{name}: {len(self):,} of {len(source):,} samples, {len(self.classes):,} classes, {size} px, read as they are needed"
            )
            + (f", {len(faults):,} quarantined" if faults else "")
            + (f", {self.uncaptioned:,} without a caption (the empty one stands for it)" if self.uncaptioned else "")
            + (f", {self.unlabelled:,} without a label" if self.unlabelled else "")
        )

    @property
    def resolved_config(self) -> dict[str, str]:
        """content makes the names of runs depend on the files."""
        return {"content_hash": self.content}

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the pixels: the same wherever the files are."""
        parts = (
            self.source.identity,
            self.size,
            self.channels,
            self.rows.tolist(),
            *([] if self.crop == "centre" else [self.crop]),
        )
        return f"{type(self).__name__.lower()}-{sha256(repr(parts).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        """One sample of the first pass: image, caption, label, index."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, asked for {index}")
        batch = self.batch([(0, index % len(self))])
        return {
            "image": batch["image"][0],
            "caption": batch["caption"][0],
            "label": int(batch["label"][0]),
            "index": batch["index"][0],
        }

    def batch(self, at: Sequence[tuple[int, int]]) -> dict:
        """The samples at (place, index) pairs: what `about` says of them, and image (B, C, H, W) float32 in [-1, 1]."""
        batch = self.batch_metadata(at)
        return {"image": flip_where(self.pixels(batch["index"]), batch["flip"]), **batch}

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1], never flipped."""
        return torch.stack([self.decoded(int(i)) for i in index]).float().div_(127.5).sub_(1)

    def decoded(self, index: int) -> Tensor:
        """An image (C, H, W) uint8. Raises UserError where neither it nor the next ones can be read."""
        for place in range(index, index + min(MAX_CONSECUTIVE_FAILURES, len(self))):
            row = int(self.rows[place % len(self)])
            try:
                return CROPS[self.crop](self.source.image(row), self.size, self.channels)[0]
            except Exception as error:  # Pillow's many plugins raise what they please at a broken file
                if row not in self.unreadable:
                    self.unreadable.add(row)
                    said = " ".join(str(error).split())
                    log.warning("%s cannot be read (%s); the next image stands for it", self.source.name(row), said)
                if len(self.unreadable) > max(MAX_CONSECUTIVE_FAILURES, UNKNOWN * len(self)):
                    raise UserError(
                        f"{self.name}: {len(self.unreadable)} of {len(self):,} images could not be read so far, the last is "
                        f"{self.source.name(row)}; `python -m ldm.data.check {self.source.root}` finds and quarantines them all"
                    ) from None
        raise UserError(
            f"{self.name}: {MAX_CONSECUTIVE_FAILURES} images in a row cannot be read, from {self.source.name(int(self.rows[index]))} on"
        )

    def batch_metadata(self, at: Sequence[tuple[int, int]]) -> dict:
        """Everything but the pixels: label (B,) int64, flip (B,) bool; caption, index and place are lists."""
        index = [i for _, i in at]
        return {
            "caption": [self.caption(place, i) for place, i in at],
            "label": torch.tensor([self.source.label(int(self.rows[i])) for i in index], dtype=torch.long),
            "flip": torch.tensor(
                [self.flip and bool(derive_seed(self.seed, "flip", place, i) & 1) for place, i in at], dtype=torch.bool
            ),
            "index": index,
            "place": [place for place, _ in at],
        }

    def caption(self, place: int, index: int) -> str:
        """The caption that goes with the sample at index in pass place, "" without one."""
        row = int(self.rows[index])
        label = self.source.label(row)
        texts = self.source.texts(row) if self.source.captioned else self.captions[label] if label >= 0 else ()
        return texts[derive_seed(self.seed, "caption", place, index) % len(texts)] if texts else ""


def class_captions(classes: Sequence[str]) -> dict[str, list[str]]:
    """{class: captions} for bare names."""
    return {name: [text.format(name.replace("_", " ")) for text in TEMPLATES] for name in classes}


def split_rows(keys: Sequence[int], held_out: float, split: str) -> list[int]:
    """The samples of a split, chosen by their 63-bit keys alone: whether others are there makes no difference."""
    if split not in ("train", "test"):
        raise UserError(f"split={split!r}: expected train or test")
    return [i for i, one in enumerate(keys) if (one < held_out * 2**63) == (split == "test")]
