"""Pairs of images and the instructions that lead from one to the other, for InstructPix2Pix (Brooks et al. 2023)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data.wrapper import WrappedDataset
from ldm.errors import ConfigError
from ldm.tensors import choose


@dataclass(frozen=True)
class Edit:
    """An edit of images.

    texts: instructions that ask for it, each with the same probability.  change: image (C, H, W) in [-1, 1] -> the
    edited image, of the same shape.
    Raises ConfigError without a text.
    """

    texts: Sequence[str]
    change: Callable[[Tensor], Tensor]

    def __post_init__(self):
        if not self.texts:
            raise ConfigError("degradation.edits: an edit has no texts; expected one instruction or more")


class EditDataset(WrappedDataset):
    """A data set whose images are edited as an instruction says: source, instruction and result.

    A batch has the data set's image as `source` (B, C, H, W), the edited one as `image`, the instruction as `caption`,
    and as `label` the edit's number in `edits`: the edits are the classes of this data set.
    Edit and text are functions of (seed, epoch, index), chosen anew in each epoch.
    `pixels` are not edited. Everything else is the data set's. Raises ConfigError without edits.
    """

    def __init__(self, dataset: Any, edits: Sequence[Edit], seed: int = 0):
        if not edits:
            raise ConfigError("degradation.edits=[]: expected one edit or more")
        super().__init__(dataset)
        self.edits, self.seed = list(edits), seed
        self.captions = [list(edit.texts) for edit in self.edits]
        self.classes = [texts[0] for texts in self.captions]
        self.unlabelled = self.uncaptioned = 0

    @property
    def changed_by(self) -> list[str]:
        """The options because of which a batch has other images than `pixels` and their mirror images."""
        return [*getattr(self.dataset, "changed_by", []), "degradation.edits"]

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return the samples, (epoch, index) pairs, with source, image, caption and label as above."""
        batch = {**self.dataset.batch(samples), **self._instructions(samples)}
        edits = [self.edits[label] for label in batch["label"].tolist()]
        source = batch["image"]
        image = torch.stack([edit.change(x) for edit, x in zip(edits, source, strict=True)])
        return {**batch, "image": image, "source": source}

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return a batch without its images."""
        return {**self.dataset.batch_metadata(samples), **self._instructions(samples)}

    def all_captions(self) -> list[str]:
        """Return every instruction, without repetitions."""
        return list(dict.fromkeys(text for texts in self.captions for text in texts))

    def _instructions(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Choose edit and text of each sample."""
        labels = [choose(range(len(self.edits)), self.seed, "edit", *sample) for sample in samples]
        texts = [
            choose(self.captions[k], self.seed, "text", *sample) for k, sample in zip(labels, samples, strict=True)
        ]
        return {"caption": texts, "label": torch.tensor(labels, dtype=torch.long)}


def mirror(image: Tensor) -> Tensor:
    """Flip an image (C, H, W) left to right."""
    return image.flip(-1)


def upside_down(image: Tensor) -> Tensor:
    """Flip an image (C, H, W) top to bottom."""
    return image.flip(-2)


def rotate(image: Tensor, quarter_turns: int = 1) -> Tensor:
    """Rotate an image (C, H, W) counterclockwise. Raises ConfigError for an odd number of turns unless H = W."""
    if quarter_turns % 2 and image.shape[-2] != image.shape[-1]:
        size = "x".join(map(str, image.shape[-2:]))
        raise ConfigError(f"degradation.edits: a quarter turn of an image of {size} pixels; expected square images")
    return torch.rot90(image, quarter_turns, (-2, -1))


def negative(image: Tensor) -> Tensor:
    """Return the negative of an image in [-1, 1]."""
    return -image
