"""A data set of the Hugging Face hub, or one saved by the library `datasets`, read row by row."""

import io
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ldm.data.captions import RECORD, SHOWN, captions_in
from ldm.data.folder import EXTENSIONS, OPTIONAL_EXTENSIONS
from ldm.data.lazy import LazyDataset, class_captions, split_rows
from ldm.data.shards import CLASSES
from ldm.errors import UserError
from ldm.tensors import derive_seed

ROWS = 1000  # rows of a column in memory at a time
TAIL = 4096  # bytes at an image's end that enter its digest: in PNG and JPEG files they depend on every pixel


class HuggingFace(LazyDataset):
    """A data set with a column of images, by its name on the hub or the folder written by save_to_disk.

    config: name of a variant on the hub.
    train, test: names of splits; without `test`, it is a part test_fraction of the training split, by row number.
    image, caption, label: names of columns.  image: images, their bytes or their paths.
    caption: texts, records with a text, or lists of these; a row without one trains the empty condition.
    label: class numbers or words; -1, null and "" are no label.
    Raises UserError naming what is missing or of another type.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        size: int | Sequence[int] = 256,
        channels: int = 3,
        config: str | None = None,
        train: str = "train",
        test: str | None = None,
        image: str = "image",
        caption: str | None = "text",
        label: str | None = None,
        test_fraction: float = 0.02,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        columns, folder = (image, caption, label), Path(path).expanduser()
        source = Rows(load(path, config, train), f"{path} {config or ''} {train}", *columns, folder=folder)
        if split == "test" and test is not None:
            classes = list(source.classes) if label is not None else None
            source = Rows(
                load(path, config, test), f"{path} {config or ''} {test}", *columns, folder=folder, words=classes
            )
        keys = [derive_seed("held out", i) for i in range(len(source))]
        rows = split_rows(keys, test_fraction if test is None else float(split == "test"), split)
        super().__init__(f"{path} ({split})", source, rows, size, channels, content_hash, seed, flip)


class Rows:
    """The source of HuggingFace: a table of the library `datasets`.

    folder: base of relative image paths.  words: names of the classes, by default those of the label column.
    """

    def __init__(
        self,
        table: Any,
        name: str,
        image: str,
        caption: str | None,
        label: str | None,
        folder: Path | None = None,
        words: Sequence[str] | None = None,
    ):
        for column in (image, caption, label):
            if column is not None and column not in table.features:
                raise UserError(f"{name}: no column {column!r}; it has {', '.join(table.features)}")
        check_images(f"{name}: column {image!r}", table.features[image])
        self.named, self.root, self.folder, self.captioned = name, name, folder or Path(), caption is not None
        self.table, self.images = table, table.select_columns([image]).with_format("arrow")
        self.column = caption
        digest, none = sha256(), torch.zeros(len(table), dtype=torch.bool)
        self.labels, self.unlabelled, self.uncaptioned = none.long(), none, none
        self.classes: dict[str, list[str]] = {"image": [""]}
        if label is not None:
            numbers, classes = read_labels(f"{name}: column {label!r}", table, label, words)
            self.labels, self.classes = torch.tensor(numbers), class_captions(classes)
            self.uncaptioned = self.unlabelled = self.labels < 0
            digest.update(repr((classes, numbers)).encode())
        if caption is not None:
            check_captions(f"{name}: column {caption!r}", table.features[caption])
            texts = [captions_in(cell) for cell in cells(table, caption)]
            self.uncaptioned = torch.tensor([not captions for captions in texts])
            digest.update(repr(texts).encode())
            if label is None:
                samples = [text for captions in texts[:: -(-len(texts) // SHOWN)] for text in captions]
                self.classes = {"image": list(dict.fromkeys(samples)) or [""]}
        for part in self._images_digested():
            digest.update(part)
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_captions"}

    @cached_property
    def _captions(self) -> Any:
        """The caption column alone, mapped from the disk where the table is."""
        return self.table.select_columns([self.column]).with_format("arrow")[:].column(0)

    def image(self, i: int) -> Path | io.BytesIO:
        """Return the image's file. Raises ValueError for a row without one."""
        cell = self._cell(i).as_py()
        if isinstance(cell, dict):
            cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
        if not cell:
            raise ValueError("no image in this row")
        return io.BytesIO(cell) if isinstance(cell, bytes) else self._file(cell)

    def texts(self, i: int) -> list[str]:
        """Return the row's captions."""
        return captions_in(self._captions[i].as_py()) if self.captioned else []

    def label(self, i: int) -> int:
        """Return the row's class, -1 without one; 0 in a table without labels."""
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """Return a name of the row for messages."""
        return f"{self.named}, row {i}"

    def _cell(self, i: int) -> Any:
        return self.images[i].column(0)[0]

    def _file(self, path: str) -> Path:
        return Path(path) if os.path.isfile(path) else self.folder / path

    def _images_digested(self) -> Iterator[bytes]:
        """Yield data that depend on the images, not on their folder: names, sizes, and the last bytes of some."""
        import pyarrow as pa
        import pyarrow.compute as pc

        def is_text(kind: pa.DataType) -> bool:
            return pa.types.is_string(kind) or pa.types.is_large_string(kind)

        for start in range(0, len(self), ROWS):
            column = self.images[start : start + ROWS].column(0)
            paths: list[str | None] = [None] * len(column)
            if pa.types.is_struct(column.type):
                names = [field.name for field in column.type]
                paths = pc.struct_field(column, "path").to_pylist() if "path" in names else paths
                column = pc.struct_field(column, "bytes")
            if is_text(column.type):
                paths, sizes = column.to_pylist(), [None] * len(column)
            else:
                sizes = pc.binary_length(column).to_pylist()
            for path, size in zip(paths, sizes, strict=True):
                yield repr((Path(path).name, size_of(self._file(path))) if size is None and path else size).encode()
        for i in range(0, len(self), -(-len(self) // SHOWN) or 1):
            cell = self._cell(i)
            data = cell["bytes"] if pa.types.is_struct(cell.type) else cell
            if not is_text(data.type) and data.is_valid:
                yield data.as_buffer()[-TAIL:].to_pybytes()
                continue
            try:
                with open(self._file(str(data if is_text(data.type) else cell["path"])), "rb") as file:
                    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                    yield file.read()
            except (OSError, ValueError, LookupError, TypeError):  # reported when the image is decoded
                yield b"-"


def size_of(path: Path) -> int:
    """Return a file's size in bytes, -1 if it cannot be read."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def cells(table: Any, column: str) -> Iterator[Any]:
    """Yield the cells of one column as Python values, without reading the other columns."""
    selected = table.select_columns([column]).with_format("arrow")
    for start in range(0, len(selected), ROWS):
        yield from selected[start : start + ROWS].column(0).to_pylist()


def check_images(what: str, feature: Any) -> None:
    """Raise UserError for a column that contains neither images nor their bytes or paths."""
    dtype = getattr(feature, "dtype", None)
    inside = (
        {name: getattr(field, "dtype", None) for name, field in feature.items()} if isinstance(feature, dict) else {}
    )
    readable = dtype in ("PIL.Image.Image", "binary", "large_binary", "string", "large_string")
    if not readable and inside.get("bytes") not in ("binary", "large_binary"):
        raise UserError(
            f"{what} holds {feature!r:.80}: expected one image a row, its bytes or its path; choose data.image"
        )


def check_captions(what: str, feature: Any) -> None:
    """Raise UserError for a column whose cells captions_in cannot read."""
    inside = _item(feature)
    if isinstance(inside, dict):
        inside = _item(next((inside[name] for name in RECORD if name in inside), None))
    if getattr(inside, "dtype", None) not in ("string", "large_string", "null"):
        expected = f"expected texts, lists of texts, or records with one of {', '.join(RECORD)}"
        raise UserError(
            f"{what} holds {feature!r:.80}: {expected}; choose data.caption, null for none, and data.label for classes"
        )


def _item(feature: Any) -> Any:
    """Return the feature of a list's items; any other feature unchanged."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)


def read_labels(what: str, table: Any, column: str, words: Sequence[str] | None = None) -> tuple[list[int], list[str]]:
    """Read a column of class numbers or words: the class of each row, -1 for none, and the names of the classes.

    words: names of the classes, if they are known.
    Raises UserError for any other column, and for a label that is not a class.
    """
    feature, values = table.features[column], list(cells(table, column))
    kind = str(getattr(feature, "dtype", None))
    if kind in ("string", "large_string"):
        labels = [" ".join(value.split()) if value else "" for value in values]
        classes = list(words) if words is not None else sorted({word for word in labels if word})
        number = {word: i for i, word in enumerate(classes)} | {"": -1}
        if wrong := next((word for word in labels if word not in number), None):
            raise UserError(
                f"{what} holds {wrong!r:.80}, which is no class of the training split ({len(classes):,} classes)"
            )
        numbers = [number[word] for word in labels]
    elif kind.startswith(("int", "uint", "float", "bool", "null")):
        numbers = [_number(value) for value in values]
        names = words if words is not None else getattr(feature, "names", None)
        classes = (
            list(names) if names is not None else [str(i) for i in range(min(max(numbers, default=-1), CLASSES) + 1)]
        )
        limit = min(len(classes), CLASSES)
        if any(not -1 <= i < limit for i in numbers):
            first = next(value for value, i in zip(values, numbers, strict=True) if not -1 <= i < limit)
            raise UserError(
                f"{what} holds {first}: expected class numbers from 0 to {limit - 1}, and -1 or null for none"
            )
    else:
        raise UserError(
            f"{what} holds {feature!r:.80}: expected one class a row, a number or a word; choose data.label, or null"
        )
    if not classes:
        raise UserError(f"{what} has no label in any row; choose data.label, or null")
    return numbers, classes


def _number(value: float | None) -> int:
    """Return a class number, -1 for none, and a number out of range for what is not a class."""
    if value is None or value != value:
        return -1
    return int(value) if -1 <= value < CLASSES and int(value) == value else -2 if value < 0 else CLASSES


def load(path: str, config: str | None, split: str) -> Any:
    """Load a split as a table. Raises UserError if the library, the data set or the split is missing."""
    try:
        import datasets
    except ImportError:
        raise UserError("data=huggingface needs the library datasets: pip install -e '.[data]'") from None
    folder = Path(path).expanduser()
    try:
        splits = datasets.load_from_disk(str(folder)) if folder.is_dir() and any(folder.glob("data*_*.json")) else None
        splits = datasets.load_dataset(path, config) if splits is None else splits
    except Exception as error:  # the library raises many kinds
        raise UserError(f"path={path}: {' '.join(str(error).split())}") from None
    if not isinstance(splits, dict):
        return splits
    if split not in splits:
        raise UserError(f"path={path}: no split {split!r}; it has {', '.join(splits)}")
    if folder.is_dir() and getattr(splits[split].info, "builder_name", None) == "imagefolder":
        check_splits(folder, {name: len(table) for name, table in splits.items()})
    return splits[split]


def check_splits(folder: Path, rows: dict[str, int]) -> None:
    """Raise UserError if images in a folder are in no split: the library takes names like train and val as splits."""
    count = 0
    for _, inner, files in os.walk(folder):
        inner[:] = [name for name in inner if not name.startswith((".", "__"))]
        if any(name.startswith("metadata.") for name in files):  # such a list selects the rows
            return
        count += sum(
            name.lower().endswith(EXTENSIONS + OPTIONAL_EXTENSIONS) and not name.startswith(".") for name in files
        )
    if count > sum(rows.values()):
        read = ", ".join(f"{name} of {number:,}" for name, number in rows.items())
        raise UserError(
            f"path={folder}: {count - sum(rows.values()):,} of its {count:,} images are in no split ({read}): names "
            f"such as train, test and val are read as splits; rename that folder, give data.path of one split, "
            f"or use data=folder"
        )
