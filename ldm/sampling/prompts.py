"""The captions and classes of a sampling request."""

import csv
from pathlib import Path

from ldm.errors import UserError
from ldm.runs.data_card import DataCard


def captions_and_labels(
    card: DataCard,
    num: int,
    prompt: str | None = None,
    prompts: str | None = None,
    label: str | None = None,
    labels: str = "balanced",
    seed: int = 0,
) -> list[tuple[str, int | None]]:
    """Return (caption, class) of each image; the class is None where the prompts do not name one.

    card: of the model's training data.  num: images; with `prompts`, images of each prompt.  prompt: one text for all
    images.
    prompts: a file of prompts, see `read_prompts`.  label: one class for all images, by name or number.
    labels: without any of these three, "balanced" gives image i the class i mod K, "random" a class chosen by seed + i;
    the captions are then the data's own.  Data without classes and captions give no pairs.
    Raises UserError.
    """
    from ldm.tensors import choose, derive_seed

    if prompt is not None:
        return [(prompt, None)] * num
    if prompts is not None:
        return [pair for pair in read_prompts(Path(prompts), card) for _ in range(num)]
    count = len(card.classes)
    kinds: list[int | None]
    if label is not None:
        kinds = [parse_class(label, card)] * num
    elif not count:
        kinds = [None] * num if card.captions else []
    else:
        kinds = [derive_seed(seed + i, "label") % count if labels == "random" else i % count for i in range(num)]
    return [(choose(card.captions[k or 0], 0, "told", i) if card.captions else "", k) for i, k in enumerate(kinds)]


def read_prompts(path: Path, card: DataCard) -> list[tuple[str, int | None]]:
    """Read the prompts of a text file, one a line, or of a csv with the columns prompt and label (a class).

    Raises UserError naming the file.
    """
    if not path.is_file():
        raise UserError(
            f"prompts={path}: no such file; expected one prompt a line, or a csv with the columns label,prompt"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"prompts={path} is not text in UTF-8; expected one prompt a line") from None
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        if not rows or not {"label", "prompt"} <= rows[0].keys():
            raise UserError(f"prompts={path}: expected the columns label,prompt and at least one row")
        for number, row in enumerate(rows, 2):
            if row["label"] is None or row["prompt"] is None:
                raise UserError(f"prompts={path}, line {number}: expected a label and a prompt")
        return [(row["prompt"], parse_class(row["label"], card)) for row in rows]
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"prompts={path}: the file is empty; expected one prompt a line")
    return [(line, None) for line in lines]


def parse_class(label: str, card: DataCard) -> int:
    """Return the number of a class given by name or number. Raises UserError listing the classes."""
    if not card.classes:
        raise UserError(f"label={label}: the data of this run have no classes; leave it out")
    if label in card.classes:
        return list(card.classes).index(label)
    if str(label).isdigit() and int(label) < len(card.classes):
        return int(label)
    raise UserError(f"label={label}: expected one of {', '.join(card.classes)}, or 0..{len(card.classes) - 1}")
