"""Captioned emoji, each in two styles: 3-D renders and flat drawings."""

from collections.abc import Sequence

import torch

from ldm.data.glyphs import ARTISTS, GROUPS, Glyph, glyphs
from ldm.data.memory import InMemoryDataset
from ldm.errors import ConfigError
from ldm.tensors import derive_seed

TEMPLATES = {
    "3d": ("a 3d render of {}", "{}, 3d render", "a glossy 3d emoji: {}"),
    "flat": ("a flat illustration of {}", "{}, flat illustration", "a flat drawing: {}"),
    "pencil": ("a pencil drawing of {}", "{}, pencil drawing", "a drawing in pencil: {}"),
}
TAGS = 3  # of them in a caption


class Emoji(InMemoryDataset):
    """Emoji on white, image i showing emoji i // S in style i % S of S: image (3, size, size) in [-1, 1].

    A caption says what the picture shows and in which style; labels are the nine groups of Unicode; the batch has style (B,) int64, a place
    in `styles`.  split: train or test, divided by emoji: all styles and skin tones of one are on the same side.
    held_out: the part that test gets.  skin_tones: also people and hands in each skin tone.
    Raises ConfigError for a bad option, AssetNotFoundError without the pictures.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        styles: Sequence[str] = ("3d", "flat"),
        skin_tones: bool = False,
        test_fraction: float = 0.1,
        seed: int = 0,
        flip: bool = False,
    ):
        if split not in ("train", "test"):
            raise ConfigError(f"split={split!r}: expected train or test")
        if not styles or len(set(styles)) < len(styles) or not set(styles) <= set(ARTISTS):
            raise ConfigError(f"styles={list(styles)}: expected some of {', '.join(ARTISTS)}, each once")
        if not 16 <= size <= 256:
            raise ConfigError(f"size={size}: expected 16 to 256 pixels")
        if not 0 < test_fraction < 1:
            raise ConfigError(f"test_fraction={test_fraction}: expected a part between 0 and 1")
        pictures, every = glyphs(size, styles, skin_tones)
        rows = [
            i
            for i, glyph in enumerate(every)
            if (derive_seed("held out", glyph.base) < test_fraction * 2**63) == (split == "test")
        ]
        self.styles, self.glyphs = list(styles), [every[i] for i in rows]
        every_text = [captions(glyph, style) for glyph in self.glyphs for style in styles]
        labels = torch.tensor([GROUPS.index(glyph.group) for glyph in self.glyphs]).repeat_interleave(len(styles))
        told: dict[str, list[str]] = {group: [] for group in GROUPS}
        for label, texts in zip(labels.tolist(), every_text, strict=True):
            told[GROUPS[label]].append(texts[0])
        classes = {group: texts or [group.replace("-", " and ")] for group, texts in told.items()}
        super().__init__(f"emoji-{split}", pictures[rows].flatten(0, 1), labels, classes, seed, flip, texts=every_text)

    def batch_metadata(self, at: Sequence[tuple[int, int]]) -> dict:
        """Everything but the pixels: as any data set, and style (B,) int64."""
        return {**super().batch_metadata(at), "style": torch.tensor([i % len(self.styles) for _, i in at])}


def captions(glyph: Glyph, style: str) -> list[str]:
    """What is said of an emoji drawn in a style: its annotation in every template, then, in the first, with a few of its tags at a time."""
    name = words(glyph.annotation)
    known = set(name.lower().replace(",", "").split())
    tags = [tag for tag in glyph.tags if not set(tag.lower().split()) <= known]
    groups = [", ".join([name, *tags[i : i + TAGS]]) for i in range(0, len(tags), TAGS)]
    return [template.format(name) for template in TEMPLATES[style]] + [
        TEMPLATES[style][0].format(text) for text in groups
    ]


def words(annotation: str) -> str:
    """An annotation as one would say it: "flag: Chad" is "the flag of Chad", "man: beard" is "man, beard"."""
    kind, colon, what = annotation.partition(": ")
    return f"the {kind} of {what}" if colon and kind == "flag" else annotation.replace(": ", ", ")
