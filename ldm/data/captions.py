"""Find the captions of a folder's images: in files next to them, in a list, in the subfolders' or the files' names."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.data.memory import read_captions
from ldm.data.stream import length_of
from ldm.errors import UserError
from ldm.io.parse import parse_json

TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
CAMERA = {
    "img",
    "image",
    "dsc",
    "dscn",
    "dscf",
    "pxl",
    "mvi",
    "gopr",
    "photo",
    "picture",
    "pic",
    "screenshot",
    "untitled",
    "wa",
    "copy",
}
MAX_CAPTION_CHARS = 1 << 20  # characters read per caption file
SHOWN = 500  # captions that represent the data set if there are no classes
LISTS = (".csv", ".tsv", ".jsonl")
LIST_NAMES = ("metadata.csv", "metadata.jsonl")  # a list in the folder under one of these names is used by default
RECORD = (  # keys of a caption's text in a record
    "caption",
    "text",
    "raw",
    "sentence",
    "description",
    "prompt",
)
# column names, in order of preference
FILE, TEXT = (
    ("file_name", "filename", "file", "image", "path", "name"),
    ("caption", "text", "description", "prompt"),
)


@dataclass(frozen=True)
class ImageAnnotations:
    """Annotations of N images: captions of each, labels, {class: captions}, and remarks."""

    texts: Sequence[Sequence[str]]
    labels: Sequence[int]
    classes: dict[str, list[str]]
    notes: Sequence[str]


def annotate(root: Path, names: Sequence[str], captions: str | Path | None = None) -> ImageAnnotations:
    """Find captions and classes of the images `names` below root.

    The sources, in order: a list `captions`, or metadata.csv or metadata.jsonl in root; the .txt or .json next to each
    image; if all images are in subfolders, their class, with its captions from the JSON file `captions` if given; the
    file names.
    Raises UserError for a `captions` file that does not match.
    """
    source = (
        Path(captions).expanduser()
        if captions is not None
        else next((root / name for name in LIST_NAMES if (root / name).is_file()), None)
    )
    if source is not None and source.suffix.lower() in LISTS:
        rows = read_list(source)
        texts, notes = match(source, rows, names)
        return _one_class(names, texts, notes)
    sidecars = [sidecar_captions(root / name) for name in names]
    folders = [printable(name.split("/")[0]) if "/" in name else "" for name in names]
    if captions is not None and (any(sidecars) or not all(folders)):
        raise UserError(
            f"captions={captions} gives captions to classes, but {root} has images outside class subfolders, or with "
            f"captions beside them; leave it null, or name a list of images ({', '.join(LISTS)})"
        )
    if not any(sidecars) and all(folders):
        classes = _classes(sorted(set(folders)), captions)
        label = {name: i for i, name in enumerate(classes)}
        return ImageAnnotations(
            [classes[name] for name in folders],
            [label[name] for name in folders],
            classes,
            [f"{len(classes):,} classes"],
        )
    return _one_class(names, sidecars, ["captions beside them" if any(sidecars) else "captions from their names"])


def _one_class(names: Sequence[str], texts: Sequence[Sequence[str]], notes: list[str]) -> ImageAnnotations:
    """Annotate images of a single class; those without a caption get the words of their file names."""
    texts = [list(lines) or [words_from_filename(Path(name).stem)] for name, lines in zip(names, texts, strict=True)]
    bare = [name for name, lines in zip(names, texts, strict=True) if lines == [""]]
    notes = notes + ([f"{len(bare):,} without caption: {format_names(bare)}"] if bare else [])
    all_texts = list(dict.fromkeys(text for lines in texts for text in lines if text)) or [""]
    return ImageAnnotations(texts, [0] * len(names), {"image": all_texts[:: -(-len(all_texts) // SHOWN)]}, notes)


def _classes(names: Sequence[str], captions: str | Path | None) -> dict[str, list[str]]:
    """Return {class: captions}, from the JSON file `captions` or the class names in templates."""
    if captions is None:
        return {name: [text.format(words_from_filename(name) or name) for text in TEMPLATES] for name in names}
    try:
        by_class = read_captions(Path(captions).expanduser())
    except (OSError, ValueError) as error:
        raise UserError(f"captions={captions}: {error}") from None
    if missing := [name for name in names if not by_class.get(name)]:
        raise UserError(
            f"captions={captions}: no caption for {format_names(missing)}; "
            f"expected at least one for each of {len(names)} subfolders"
        )
    return {name: by_class[name] for name in names}


def read_list(path: Path) -> list[tuple[str, list[str]]]:
    """Read (file name, captions) of each row of a .csv or .tsv file with a header, or of a .jsonl file.

    Raises UserError naming the row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"captions={path}: {error.strerror or error}") from None
    if path.suffix.lower() == ".jsonl":
        lines = enumerate(text.splitlines(), 1)
        rows = [(number, _object(path, number, line)) for number, line in lines if line.strip()]
    else:
        delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0] else ","
        try:
            rows = list(enumerate(csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter), 2))
        except csv.Error as error:
            raise UserError(f"captions={path} is not a list of captions ({error})") from None
    if not rows:
        raise UserError(f"captions={path}: no rows in it; expected a file name and a caption in each")
    return [_row(path, number, row) for number, row in rows]


def _object(path: Path, number: int, line: str) -> dict:
    """Parse one line of a .jsonl file. Raises UserError unless it is an object."""
    try:
        value = parse_json(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"captions={path}: row {number} is not a JSON object")
    return value


def _row(path: Path, number: int, row: dict) -> tuple[str, list[str]]:
    """Return file name and captions of one row. Raises UserError without these columns."""
    lower = {str(name).strip().lower(): value for name, value in row.items() if name is not None}
    file, text = (next((lower[name] for name in names if name in lower), None) for names in (FILE, TEXT))
    if not isinstance(file, str) or not set(TEXT) & set(lower):
        columns = f"one of {', '.join(FILE)} and one of {', '.join(TEXT)}"
        raise UserError(
            f"captions={path}: row {number} has {', '.join(map(str, lower)) or 'nothing'}; expected columns {columns}"
        )
    captions = [" ".join(caption.split()) for caption in _texts(text) if caption.strip()]
    return file.strip().replace("\\", "/").removeprefix("./"), captions


def match(path: Path, rows: Sequence[tuple[str, list[str]]], names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Return the captions of each image, and remarks on images and rows without a match.

    A row names an image by its path below the root, or by its bare name if only one image has it.
    Raises UserError if no row matches.
    """
    bare: dict[str, list[str]] = {}
    for name in names:
        bare.setdefault(name.rpartition("/")[2], []).append(name)
    matches: dict[str, list[str]] = {name: [] for name in names}
    unmatched: list[str] = []
    for file, texts in rows:
        alone = bare.get(file.rpartition("/")[2], [])
        image: str | None = file if file in matches else alone[0] if len(alone) == 1 else None
        if image is None:
            unmatched.append(file)
        else:
            matches[image] += texts
    if len(unmatched) == len(rows):
        raise UserError(
            f"captions={path}: none of {len(rows):,} rows names an image, {format_names(unmatched)}; "
            f"the images are {format_names(names)}"
        )
    missing = [name for name, texts in matches.items() if not texts]
    notes = [f"captions from {path.name}"]
    notes += [f"{len(missing):,} not in it: {format_names(missing)}"] if missing else []
    notes += [f"{len(unmatched):,} of its rows without an image: {format_names(unmatched)}"] if unmatched else []
    return [matches[name] for name in names], notes


def sidecar_captions(path: Path) -> list[str]:
    """Read the captions next to an image: one per line of its .txt, else "caption" in its .json; empty without any."""
    for suffix, parse in ((".txt", str.splitlines), (".json", _caption)):
        try:
            with open(path.with_suffix(suffix), encoding="utf-8-sig", errors="replace") as file:
                lines = parse(file.read(MAX_CAPTION_CHARS))
        except OSError:
            continue
        if lines := [line for line in (" ".join(line.split()) for line in lines) if line]:
            return lines
    return []


def _caption(text: str) -> list[str]:
    """Return the raw captions in a .json file; empty if it has none."""
    try:
        value = parse_json(text)
    except ValueError:
        return []
    return _texts(value.get("caption")) if isinstance(value, dict) else []


def captions_in(value: object) -> list[str]:
    """Return the captions in JSON: a text or number, a record with one of RECORD, or a list of these; else none."""
    return [text for text in (" ".join(caption.split()) for caption in _texts(value)) if text]


def _texts(value: object) -> list[str]:
    """Return captions as `captions_in` does, with their white space."""
    parts: list[object] = []
    for entry in value if isinstance(value, list) else [value]:
        part = next((entry[name] for name in RECORD if name in entry), None) if isinstance(entry, dict) else entry
        parts += part if isinstance(part, list) else [part]
    return [str(part) for part in parts if isinstance(part, (str, int, float)) and not isinstance(part, bool)]


def lists_captions(data: Any) -> bool:
    """Return whether a data set has an end and can list its captions."""
    return hasattr(data, "all_captions") and length_of(data) is not None


def known_captions(data: Any) -> list[str] | None:
    """Return every caption of a data set and the empty one, each once; None if the data set does not list them."""
    if not lists_captions(data):
        return None
    by_class = (text for texts in data.captions for text in texts)  # sample grids and scores draw these
    return list(dict.fromkeys(["", *data.all_captions(), *by_class]))


def words_from_filename(name: str) -> str:
    """Return the words in a file's name, without numbers and camera prefixes: "red_car-2 (copy)" gives "red car"."""
    parts = (re.fullmatch(r"([^\W\d_]+)\d*", part) for part in re.split(r"[\W_]+", printable(name)))
    return " ".join(part[1] for part in parts if part and part[1].lower() not in CAMERA)


def format_names(names: Iterable[str], limit: int = 3) -> str:
    """Join the first few names for a message."""
    names = [printable(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def printable(name: str) -> str:
    """Return a file's name as text that can be printed and encoded, whatever bytes it contains."""
    return os.fsencode(name).decode("utf-8", "replace")
