"""Samples in memory, such as captioned, labelled images, with every random choice keyed by (epoch, index)."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import ConfigError, UserError
from ldm.io.parse import parse_json
from ldm.tensors import derive_seed


class InMemoryDataset(Dataset):
    """Images (N, C, H, W) uint8, or samples (N, C, ...) float32 in [-1, 1], with labels and captions if there are any.

    rows: which of the images are the samples, None for all in order.
    Images that are mapped from the disk stay there until they are read.
    labels: class numbers; -1 is no label.  captions: {class: captions}, all of them empty for none.
    texts: captions of each sample, none for the empty condition; by default a sample gets those of its class.
    A sample's caption, and its left-right flip if flips are on, depend on (seed, epoch, index) alone: they are the same
    at any batch size, worker count or rank. Raises ValueError for labels or captions that do not match the images.
    A subclass that stores another form of its samples names its types, and returns the samples from `pixels`.
    """

    stored_types: tuple[torch.dtype, ...] = (torch.uint8, torch.float32)

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor | None = None,
        captions: Mapping[str, Sequence[str]] = MappingProxyType({}),
        seed: int = 0,
        flip: bool = False,
        rows: Tensor | None = None,
        texts: Sequence[Sequence[str]] | None = None,
    ):
        num = len(images if rows is None else rows)
        labels = torch.full((num,), -1) if labels is None else labels
        if images.dtype not in self.stored_types or images.ndim < 3 or num != len(labels):
            raise ValueError(
                f"{name}: expected images (N, C, H, W) uint8, or samples (N, C, ...) float32, and N labels, "
                f"got {images.dtype} {tuple(images.shape)}, {len(labels)}"
            )
        if any(captions.values()) and (missing := [c for c, texts in captions.items() if not texts]):
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
        self.classes, self.captions = list(captions), [list(texts) for texts in captions.values() if texts]
        if not captions and texts is not None:
            self.captions = [list(dict.fromkeys(text for several in texts for text in several)) or [""]]
        self.shape = tuple(images.shape[1:])

    @property
    def images(self) -> Tensor:
        """Images (N, C, H, W) uint8, or float32, of the samples."""
        return self.stored if self.rows is None else self.stored[self.rows]

    @property
    def unlabelled(self) -> int:
        """Number of samples without a label."""
        return int((self.labels < 0).sum())

    @property
    def uncaptioned(self) -> int:
        """Number of samples that train the empty condition as they have no caption."""
        return self.unlabelled if self.texts is None else sum(not any(texts) for texts in self.texts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        """Return one sample of the first epoch: image (C, H, W) in [-1, 1], caption, label, index."""
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
        """Return the samples, (epoch, index) pairs: `batch_metadata`, and image (B, C, H, W) float32 in [-1, 1]."""
        batch = self.batch_metadata(samples)
        image = self.pixels(batch["index"])
        if self.flip:
            image = flip_where(image, batch["flip"])
        return {"image": image, **batch}

    def pixels(self, index: Sequence[int] | Tensor) -> Tensor:
        """Return samples (B, *shape) float32 in [-1, 1], never flipped."""
        index = torch.as_tensor(index, dtype=torch.long)
        stored = self.stored[index if self.rows is None else self.rows[index]]
        return stored.float().div_(127.5).sub_(1) if stored.dtype == torch.uint8 else stored

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its images.

        samples: B pairs (epoch, index).
        Returns label (B,) int64, flip (B,) bool, and the lists caption, index and epoch. Caption and flip are functions
        of (seed, epoch, index), hence independent of batch size and number of workers.
        """
        index = [i for _, i in samples]
        return {
            "caption": [self.caption(epoch, i) for epoch, i in samples],
            "label": self.labels[torch.tensor(index, dtype=torch.long)],
            "flip": torch.tensor(
                [self.flip and bool(derive_seed(self.seed, "flip", epoch, i) & 1) for epoch, i in samples],
                dtype=torch.bool,
            ),
            "index": index,
            "epoch": [epoch for epoch, _ in samples],
        }

    def all_captions(self) -> list[str]:
        """Return every caption that a sample may have, without repetitions."""
        by_sample = self.captions if self.texts is None else self.texts
        return list(dict.fromkeys(text for texts in by_sample for text in texts))

    def caption(self, epoch: int, index: int) -> str:
        """Return the caption of a sample in an epoch, "" without one."""
        label = int(self.labels[index])
        of_class = self.captions[label] if label >= 0 and self.captions else ()
        texts = self.texts[index] if self.texts is not None else of_class
        return texts[derive_seed(self.seed, "caption", epoch, index) % len(texts)] if texts else ""

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the pixels and labels; captions, seed and flip do not change it."""
        digest = sha256(repr(((len(self), *self.stored.shape[1:]), self.classes)).encode())
        for part in iter_bytes(self.stored, self.rows):
            digest.update(part)
        digest.update(self.labels.numpy().tobytes())
        return f"{self.name}-{digest.hexdigest()[:16]}"


def iter_bytes(images: Tensor, rows: Tensor | None = None, size: int = 1 << 12) -> Iterator[bytes]:
    """Yield the bytes of some rows of a tensor in order, `size` rows at a time."""
    for start in range(0, len(images if rows is None else rows), size):
        yield (images[start : start + size] if rows is None else images[rows[start : start + size]]).numpy().tobytes()


def flip_where(x: Tensor, flip: Tensor) -> Tensor:
    """Mirror x (B, ..., W) left to right in the rows where flip (B,) bool is set."""
    return torch.where(flip.reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Read captions by class, in label order, from a JSON file {class: [caption, ...]}.

    Raises UserError for other content.
    """
    try:
        captions = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        captions = None
    if not isinstance(captions, dict) or not all(
        isinstance(v, list) and all(isinstance(x, str) for x in v) for v in captions.values()
    ):
        raise UserError(f"{path}: expected a JSON object of the form {{class: [caption, ...]}}")
    return captions
