"""Captioned, labelled images held in memory as bytes, with every random choice keyed by (pass, index)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import ConfigError, UserError
from ldm.io.parse import parse_json
from ldm.tensors import derive_seed


class InMemoryDataset(Dataset):
    """Images (N, C, H, W) uint8 with one class label each and several captions a class.

    rows: which of the images the samples are, None for all in turn.  Images that were mapped from the disk stay there until they are read.
    A label of -1 is no label.  texts: captions of each sample, none for the empty condition; by default the class's are the sample's.
    A sample's caption, and its left-right flip if flips are on, depend on (seed, place, index) alone, place being the pass over the data:
    the same at any batch size, worker count or rank.  Raises ValueError for labels or captions that do not fit.
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        captions: Mapping[str, Sequence[str]],
        seed: int = 0,
        flip: bool = False,
        rows: Tensor | None = None,
        texts: Sequence[Sequence[str]] | None = None,
    ):
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images if rows is None else rows) != len(labels):
            raise ValueError(
                f"{name}: expected uint8 images (N, C, H, W) and N labels, got {images.dtype} {tuple(images.shape)}, {len(labels)}"
            )
        if missing := [c for c, texts in captions.items() if not texts]:
            raise ConfigError(f"{name}: no caption for {', '.join(missing)}; each class needs one or more")
        if len(labels) and not -1 <= int(labels.min()) <= int(labels.max()) < len(captions):
            raise ConfigError(
                f"{name}: labels reach from {labels.min()} to {labels.max()} but {len(captions)} classes have captions"
            )
        if texts is not None and len(texts) != len(labels):
            raise ConfigError(f"{name}: captions of {len(texts)} samples, {len(labels)} labels")
        self.texts = texts
        self.name, self.stored, self.rows, self.labels, self.seed, self.flip = (
            name,
            images,
            rows,
            labels.long(),
            seed,
            flip,
        )
        self.classes, self.captions = list(captions), [list(texts) for texts in captions.values()]
        self.channels, self.size = images.shape[1], images.shape[-1]

    @property
    def images(self) -> Tensor:
        """The samples' images (N, C, H, W) uint8."""
        return self.stored if self.rows is None else self.stored[self.rows]

    @property
    def unlabelled(self) -> int:
        """The number of samples without a label."""
        return int((self.labels < 0).sum())

    @property
    def uncaptioned(self) -> int:
        """The number of samples that train the empty condition for want of a caption."""
        return self.unlabelled if self.texts is None else sum(not any(texts) for texts in self.texts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        """One sample of the first pass: image (C, H, W) in [-1, 1], caption, label, index."""
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
        image = self.pixels(batch["index"])
        if self.flip:
            image = flip_where(image, batch["flip"])
        return {"image": image, **batch}

    def pixels(self, index: Sequence[int] | Tensor) -> Tensor:
        """Images (B, C, H, W) float32 in [-1, 1], never flipped."""
        at = torch.as_tensor(index, dtype=torch.long)
        return self.stored[at if self.rows is None else self.rows[at]].float().div_(127.5).sub_(1)

    def batch_metadata(self, at: Sequence[tuple[int, int]]) -> dict:
        """Everything but the pixels: label (B,) int64, flip (B,) bool; caption, index and place are lists."""
        index = [i for _, i in at]
        return {
            "caption": [self.caption(place, i) for place, i in at],
            "label": self.labels[torch.tensor(index, dtype=torch.long)],
            "flip": torch.tensor(
                [self.flip and bool(derive_seed(self.seed, "flip", place, i) & 1) for place, i in at], dtype=torch.bool
            ),
            "index": index,
            "place": [place for place, _ in at],
        }

    def caption(self, place: int, index: int) -> str:
        """The caption that goes with the sample at index in pass place, "" without one."""
        label = int(self.labels[index])
        texts = self.texts[index] if self.texts is not None else self.captions[label] if label >= 0 else ()
        return texts[derive_seed(self.seed, "caption", place, index) % len(texts)] if texts else ""

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the pixels and labels (a change of captions, seed or flip leaves it as it is)."""
        digest = sha256(repr(((len(self), *self.stored.shape[1:]), self.classes)).encode())
        for part in iter_bytes(self.stored, self.rows):
            digest.update(part)
        digest.update(self.labels.numpy().tobytes())
        return f"{self.name}-{digest.hexdigest()[:16]}"


def iter_bytes(images: Tensor, rows: Tensor | None = None, size: int = 1 << 12) -> Iterator[bytes]:
    """The bytes of some rows of a tensor, in turn and a few at a time."""
    for start in range(0, len(images if rows is None else rows), size):
        yield (images[start : start + size] if rows is None else images[rows[start : start + size]]).numpy().tobytes()


def flip_where(x: Tensor, flip: Tensor) -> Tensor:
    """x (B, ..., W) with the rows mirrored left to right where flip (B,) bool is set."""
    return torch.where(flip.reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Captions by class, in the order of the labels, from a JSON file {class: [caption, ...]}. Raises UserError for anything else."""
    try:
        captions = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        captions = None
    if not isinstance(captions, dict) or not all(
        isinstance(v, list) and all(isinstance(x, str) for x in v) for v in captions.values()
    ):
        raise UserError(f"{path}: expected a JSON object of the form {{class: [caption, ...]}}")
    return captions
