"""What is said of a folder's images: beside them, in a list, by their subfolders or by their names."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.data.memory import read_captions
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
MAX_CAPTION_CHARS = 1 << 20  # characters of captions of one image that are read
SHOWN = 500  # captions that speak for the whole folder where there are no classes
LISTS = (".csv", ".tsv", ".jsonl")
FOUND = ("metadata.csv", "metadata.jsonl")  # a list that lies in the folder under one of these names is used unasked
RECORD = (
    "caption",
    "text",
    "raw",
    "sentence",
    "description",
    "prompt",
)  # where a caption that is a record has its text
FILE, TEXT = (
    ("file_name", "filename", "file", "image", "path", "name"),
    ("caption", "text", "description", "prompt"),
)  # columns


@dataclass(frozen=True)
class ImageAnnotations:
    """What is said of N images: captions of each, labels, {class: captions}, remarks."""

    texts: Sequence[Sequence[str]]
    labels: Sequence[int]
    classes: dict[str, list[str]]
    notes: Sequence[str]


def annotate(root: Path, names: Sequence[str], captions: str | Path | None = None) -> ImageAnnotations:
    """Captions and classes of the images `names` below root.

    In this order: from a list `captions`, or metadata.csv or metadata.jsonl in root; from the .txt or .json beside each; where all lie in
    subfolders, from their class, by the JSON file `captions` if given; from their file names.  Raises UserError for a `captions` file that
    does not fit.
    """
    given = (
        Path(captions).expanduser()
        if captions is not None
        else next((root / one for one in FOUND if (root / one).is_file()), None)
    )
    if given is not None and given.suffix.lower() in LISTS:
        rows = read_list(given)
        texts, notes = match(given, rows, names)
        return _one_class(names, texts, notes)
    beside = [sidecar_captions(root / name) for name in names]
    folders = [printable(name.split("/")[0]) if "/" in name else "" for name in names]
    if captions is not None and (any(beside) or not all(folders)):
        raise UserError(
            f"captions={captions} gives captions to classes, but {root} holds no class subfolders alone; leave it null, or name a list of "
            f"images ({', '.join(LISTS)})"
        )
    if not any(beside) and all(folders):
        classes = _classes(sorted(set(folders)), captions)
        label = {name: i for i, name in enumerate(classes)}
        return ImageAnnotations(
            [classes[name] for name in folders],
            [label[name] for name in folders],
            classes,
            [f"{len(classes):,} classes"],
        )
    return _one_class(names, beside, ["captions beside them" if any(beside) else "captions from their names"])


def _one_class(names: Sequence[str], texts: Sequence[Sequence[str]], notes: list[str]) -> ImageAnnotations:
    """Images of one class; those without a caption are told by the words of their names."""
    texts = [list(lines) or [words_from_filename(Path(name).stem)] for name, lines in zip(names, texts, strict=True)]
    bare = [name for name, one in zip(names, texts, strict=True) if one == [""]]
    notes = notes + ([f"{len(bare):,} without caption: {format_names(bare)}"] if bare else [])
    every = list(dict.fromkeys(text for one in texts for text in one if text)) or [""]
    return ImageAnnotations(texts, [0] * len(names), {"image": every[:: -(-len(every) // SHOWN)]}, notes)


def _classes(names: Sequence[str], captions: str | Path | None) -> dict[str, list[str]]:
    if captions is None:
        return {name: [text.format(words_from_filename(name) or name) for text in TEMPLATES] for name in names}
    try:
        given = read_captions(Path(captions).expanduser())
    except (OSError, ValueError) as error:
        raise UserError(f"captions={captions}: {error}") from None
    if missing := [name for name in names if not given.get(name)]:
        raise UserError(
            f"captions={captions}: nothing on {format_names(missing)}; expected a caption or more on each of {len(names)} subfolders"
        )
    return {name: given[name] for name in names}


def read_list(path: Path) -> list[tuple[str, list[str]]]:
    """(file name, captions) of each row of a .csv or .tsv file with a header, or of a .jsonl file. Raises UserError naming the row."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise UserError(f"captions={path}: {error.strerror or error}") from None
    if path.suffix.lower() == ".jsonl":
        rows = [(place, _object(path, place, line)) for place, line in enumerate(text.splitlines(), 1) if line.strip()]
    else:
        delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0] else ","
        try:
            rows = list(enumerate(csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter), 2))
        except csv.Error as error:
            raise UserError(f"captions={path} is no list of captions ({error})") from None
    if not rows:
        raise UserError(f"captions={path}: no rows in it; expected a file name and a caption in each")
    return [_row(path, place, row) for place, row in rows]


def _object(path: Path, place: int, line: str) -> dict:
    try:
        value = parse_json(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"captions={path}: row {place} is not a JSON object")
    return value


def _row(path: Path, place: int, row: dict) -> tuple[str, list[str]]:
    lower = {str(name).strip().lower(): value for name, value in row.items() if name is not None}
    file, text = (next((lower[name] for name in names if name in lower), None) for names in (FILE, TEXT))
    if not isinstance(file, str) or not set(TEXT) & set(lower):
        columns = f"one of {', '.join(FILE)} and one of {', '.join(TEXT)}"
        raise UserError(
            f"captions={path}: row {place} has {', '.join(map(str, lower)) or 'nothing'}; expected columns {columns}"
        )
    return file.strip().replace("\\", "/").removeprefix("./"), [
        " ".join(one.split()) for one in _texts(text) if one.strip()
    ]


def match(path: Path, rows: Sequence[tuple[str, list[str]]], names: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """The captions of each image, by its path below the root or, where no other has it, its bare name; remarks on what fits nothing.

    Raises UserError if nothing fits.
    """
    bare: dict[str, list[str]] = {}
    for one in names:
        bare.setdefault(one.rpartition("/")[2], []).append(one)
    told: dict[str, list[str]] = {one: [] for one in names}
    lost: list[str] = []
    for file, texts in rows:
        alone = bare.get(file.rpartition("/")[2], [])
        name: str | None = file if file in told else alone[0] if len(alone) == 1 else None
        if name is None:
            lost.append(file)
        else:
            told[name] += texts
    if len(lost) == len(rows):
        raise UserError(
            f"captions={path}: none of {len(rows):,} rows names an image, {format_names(lost)}; the images are {format_names(names)}"
        )
    silent = [one for one, texts in told.items() if not texts]
    notes = [f"captions from {path.name}"]
    notes += [f"{len(silent):,} not in it: {format_names(silent)}"] if silent else []
    notes += [f"{len(lost):,} of its rows without an image: {format_names(lost)}"] if lost else []
    return [told[one] for one in names], notes


def sidecar_captions(path: Path) -> list[str]:
    """The captions beside an image, one a line of its .txt, else those of "caption" in its .json; empty without any."""
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
    try:
        value = parse_json(text)
    except ValueError:
        return []
    return _texts(value.get("caption")) if isinstance(value, dict) else []


def captions_in(value: object) -> list[str]:
    """The captions in JSON: a text or number, a record with one of RECORD, or a list of these; none for anything else."""
    return [text for text in (" ".join(one.split()) for one in _texts(value)) if text]


def _texts(value: object) -> list[str]:
    """As captions_in, white space as it is."""
    found: list[object] = []
    for one in value if isinstance(value, list) else [value]:
        part = next((one[name] for name in RECORD if name in one), None) if isinstance(one, dict) else one
        found += part if isinstance(part, list) else [part]
    return [str(one) for one in found if isinstance(one, (str, int, float)) and not isinstance(one, bool)]


def words_from_filename(name: str) -> str:
    """What a file's name says: its words, without numbers, codes and what cameras write; "red_car-2 (copy)" is "red car"."""
    parts = (re.fullmatch(r"([^\W\d_]+)\d*", part) for part in re.split(r"[\W_]+", printable(name)))
    return " ".join(part[1] for part in parts if part and part[1].lower() not in CAMERA)


def format_names(names: Iterable[str], limit: int = 3) -> str:
    """The first few names."""
    names = [printable(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def printable(name: str) -> str:
    """A file's name as text that can be printed and encoded, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")
