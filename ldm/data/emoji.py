"""Captioned emoji in several styles: 3-D renders, flat drawings, pencil outlines."""

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
TAGS = 3  # tags per caption


class Emoji(InMemoryDataset):
    """Emoji on white: image (3, size, size) in [-1, 1]; with S styles, sample i is emoji i // S in style i % S.

    A caption names the emoji and its style; labels are the nine groups of Unicode; a batch also has style (B,) int64,
    an index into `styles`.
    split: train or test, divided by emoji: all styles and skin tones of an emoji are in the same split.
    test_fraction: fraction of the emoji in the test split.
    skin_tones: whether to include people and hands in each skin tone.
    Raises ConfigError for an invalid option, AssetNotFoundError without the source files.
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
            raise ConfigError(f"test_fraction={test_fraction}: expected a fraction between 0 and 1")
        images, all_glyphs = glyphs(size, styles, skin_tones)
        rows = [
            i
            for i, glyph in enumerate(all_glyphs)
            if (derive_seed("held out", glyph.base) < test_fraction * 2**63) == (split == "test")
        ]
        self.styles, self.glyphs = list(styles), [all_glyphs[i] for i in rows]
        every_text = [captions(glyph, style) for glyph in self.glyphs for style in styles]
        labels = torch.tensor([GROUPS.index(glyph.group) for glyph in self.glyphs]).repeat_interleave(len(styles))
        by_group: dict[str, list[str]] = {group: [] for group in GROUPS}
        for label, texts in zip(labels.tolist(), every_text, strict=True):
            by_group[GROUPS[label]].append(texts[0])
        classes = {group: texts or [group.replace("-", " and ")] for group, texts in by_group.items()}
        super().__init__(f"emoji-{split}", images[rows].flatten(0, 1), labels, classes, seed, flip, texts=every_text)

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its images, with style (B,) int64; see InMemoryDataset."""
        return {**super().batch_metadata(samples), "style": torch.tensor([i % len(self.styles) for _, i in samples])}


def captions(glyph: Glyph, style: str) -> list[str]:
    """Return an emoji's captions in a style: the annotation in every template, then with TAGS tags in the first."""
    name = words(glyph.annotation)
    known = set(name.lower().replace(",", "").split())
    tags = [tag for tag in glyph.tags if not set(tag.lower().split()) <= known]
    groups = [", ".join([name, *tags[i : i + TAGS]]) for i in range(0, len(tags), TAGS)]
    return [template.format(name) for template in TEMPLATES[style]] + [
        TEMPLATES[style][0].format(text) for text in groups
    ]


def words(annotation: str) -> str:
    """Return an annotation as prose: "flag: Chad" becomes "the flag of Chad", "man: beard" becomes "man, beard"."""
    kind, colon, what = annotation.partition(": ")
    return f"the {kind} of {what}" if colon and kind == "flag" else annotation.replace(": ", ", ")
