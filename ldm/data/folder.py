"""A folder of images, decoded once; captions from a list, files next to the images, folders or names."""

import json
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data.captions import annotate, format_names, printable
from ldm.data.decode import load_rectangle, open_image
from ldm.data.image_cache import cached_memmap
from ldm.data.memory import InMemoryDataset, iter_bytes
from ldm.data.shape import format_size, parse_size
from ldm.errors import UserError
from ldm.io.progress import ProgressBar
from ldm.tensors import derive_seed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# read by some builds of Pillow only; otherwise these files are reported as unreadable, not passed over
OPTIONAL_EXTENSIONS = (
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
)
READER = 3  # raise it when `load_rectangle` changes its pixels, so that packs decoded before are not used
DEFAULT_MAX_SIZE = {True: 256, False: 64}  # largest default size, with and without a GPU
HEADERS_READ = 200  # number of files whose headers decide on the default size and channels
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
EXPECTED_LAYOUT = (
    "expected images in it: in a subfolder for each class, or with captions beside them (x.jpg, x.txt), "
    "or named by what they show"
)


class ImageFolder(InMemoryDataset):
    """The images under `path`, scaled and cropped at the centre: image (channels, H, W) in [-1, 1].

    Hidden files are ignored.
    size: in pixels, one number for squares or [height, width]; by default squares of a power of two from 32 to 64, with
    a GPU to 256, that half of the images reach.
    channels: 3, or 1 for grey; by default as most images have.
    captions: see ldm.data.captions.annotate.
    test_fraction: fraction of the images in the test split, chosen by each file's name alone; if that leaves a split
    without an image, both splits have all images.
    max_unreadable: fraction of the files that may be unreadable.
    content_hash: expected digest of images and captions.
    Raises UserError naming the path.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int | Sequence[int] | None = None,
        channels: int | None = None,
        captions: str | Path | None = None,
        test_fraction: float = 0.02,
        max_unreadable: float = 0.2,
        content_hash: str | None = None,
        seed: int = 0,
        flip: bool = True,
    ):
        if split not in ("train", "test"):
            raise UserError(f"split={split!r}: expected train or test")
        if channels not in (None, 1, 3):
            raise UserError(f"channels={channels}: expected 3 for colour or 1 for grey")
        sides = None if size is None else parse_size(size, least=16)
        if not 0 <= test_fraction < 1:
            raise UserError(f"test_fraction={test_fraction}: expected a fraction of at least 0 and below 1")
        root = Path(path).expanduser()
        files = scan(root)
        if sides is None or channels is None:
            default = infer_size_and_channels(root, [file.name for file in files])
            sides, channels = sides or parse_size(default[0]), channels or default[1]
        pack = decode_all(root, files, sides, channels)
        self.root, self.readable, self.skipped = root, pack.files, pack.skipped
        if len(self.skipped) > max_unreadable * len(files):
            raise UserError(
                f"path={root}: {len(self.skipped):,} of {len(files):,} images cannot be read, "
                f"more than data.max_unreadable={max_unreadable}: {format_names(self.skipped)} "
                f"({next(iter(self.skipped.values()))}); repair or remove them, or allow more"
            )
        names = [file.name for file in pack.files]
        annotations = annotate(root, names, captions)
        self.held_out, rows = split_train_test(names, test_fraction)[split]
        self.files, texts = [pack.files[i] for i in rows], [annotations.texts[i] for i in rows]
        super().__init__(
            f"folder-{split}",
            pack.images,
            torch.tensor(annotations.labels)[rows],
            annotations.classes,
            seed,
            flip,
            pack.rows[rows],
            texts,
        )
        self.content = digest(pack, annotations.texts, annotations.labels)
        self.check_content(content_hash)
        where = "fits in memory" if fits_in_memory(pack.images) else "read from the disk"
        form = f"{format_size(sides)} px{'' if channels == 3 else ', grey'}, {where}"
        self.summary = ", ".join(
            [f"{root}: {len(names):,} images", *annotations.notes, form, f"{self.held_out} held out", *pack.notes]
        )

    @property
    def resolved_config(self) -> dict[str, Any]:
        """Values of the options that a config left open; content_hash makes run names depend on images and captions."""
        return {"size": format_size(self.shape[1:]), "channels": self.shape[0], "content_hash": self.content}

    def check_content(self, content: str | None) -> None:
        """Raise UserError if `content` is given and is not the digest of these images and captions."""
        if content not in (None, self.content):
            raise UserError(
                f"path={self.root}: its images or captions are not those of this run (digest {self.content}, "
                f"then {content}); put them back, or start a new run with its command"
            )


def digest(pack: "DecodedImages", texts: Sequence[Sequence[str]], labels: Sequence[int]) -> str:
    """Return 16 hex digits of SHA-256 over every pixel, caption and label."""
    shape = [len(pack.files), *pack.images.shape[1:]]
    total = sha256(json.dumps([shape, list(map(list, texts)), list(labels)]).encode())
    for part in iter_bytes(pack.images, pack.rows):
        total.update(part)
    return total.hexdigest()[:16]


def fits_in_memory(images: Tensor) -> bool:
    """Return whether the images on the disk fit in this machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
    return images.nbytes < memory


def infer_size_and_channels(root: Path, names: Sequence[str]) -> tuple[int, int]:
    """Choose size and channels for the images, by the headers of at most HEADERS_READ of them."""
    sides, colour = [], 0
    for name in names[:: -(-len(names) // HEADERS_READ)]:
        try:
            with warnings.catch_warnings(), open_image(root / name) as file:
                warnings.simplefilter("ignore")
                sides.append(min(file.size))
                colour += 1 if file.mode not in GREY_MODES else -1
        except Exception:  # reported when the images are decoded
            continue
    largest = DEFAULT_MAX_SIZE[torch.cuda.is_available()]
    size = max(32, min(largest, 2 ** int(statistics.median(sides)).bit_length() // 2)) if sides else largest
    return size, 3 if colour >= 0 else 1


class File(NamedTuple):
    """An image file: path below the root, with slashes; size in bytes and modification time, -1 if not readable."""

    name: str
    size: int
    mtime_ns: int


def scan(
    root: Path, endings: Sequence[str] = EXTENSIONS + OPTIONAL_EXTENSIONS, expected: str = EXPECTED_LAYOUT
) -> list[File]:
    """List the files below root with these endings by name, not hidden or in hidden folders; links are followed.

    expected: what should be in root, for messages.
    Raises UserError if there are none.
    """
    if not root.is_dir():
        raise UserError(f"path={root}: {'a file' if root.exists() else 'no such folder'}; {expected}")
    files, seen, visited = [], 0, set()
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = (
            []
            if (real := os.path.realpath(folder)) in visited
            else [name for name in inner if not name.startswith(".")]
        )
        names = [] if real in visited else [name for name in names if not name.startswith(".")]
        visited.add(real)  # a link may lead back up
        files += [_file(root, Path(folder, name)) for name in names if name.lower().endswith(tuple(endings))]
        seen += len(names)
    if not files:
        some = ", ".join(endings[:3])
        raise UserError(f"path={root}: nothing that ends in {some}, ... among {seen:,} files; {expected}")
    return sorted(files)


def _file(root: Path, path: Path) -> File:
    """Describe an image file."""
    name = path.relative_to(root).as_posix()
    try:
        stat = path.stat()
    except OSError:  # a broken link
        return File(name, -1, -1)
    return File(name, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class DecodedImages:
    """The decoded images of a folder.

    files: the readable ones.
    images: (N, C, height, width) uint8 of all files, mapped from the disk.  rows: rows of the readable ones in it.
    notes: remarks.  skipped: name -> fault of the others.
    """

    files: Sequence[File]
    images: Tensor
    rows: Tensor
    notes: Sequence[str]
    skipped: Mapping[str, str]


def decode_all(root: Path, files: Sequence[File], shape: tuple[int, int], channels: int) -> DecodedImages:
    """Decode these files at (height, width), or map them from the cache if they have not changed.

    Raises UserError if none can be read, or if the disk has no room for them.
    """
    key = (READER, *shape, channels, os.path.realpath(root), *map(tuple, files))
    names = [file.name for file in files]
    try:
        images, info = cached_memmap(
            "folders", key, (len(files), channels, *shape), lambda images: decode_into(root, names, images)
        )
    except UserError as error:
        raise UserError(f"path={root}: {error}") from None
    skipped = {names[int(i)]: fault for i, fault in info["skipped"].items()}
    return DecodedImages([files[i] for i in info["kept"]], images, torch.tensor(info["kept"]), info["notes"], skipped)


def decode_into(root: Path, names: Sequence[str], images: Tensor) -> dict:
    """Fill images (N, channels, height, width) uint8, except the rows of unreadable ones.

    Returns {"kept": rows of the others, "notes": [remark], "skipped": {row: fault}}.
    Raises UserError if none can be read.
    """
    _, channels, height, width = images.shape
    size = min(height, width)

    def decode(row: int) -> tuple[int, str]:
        try:
            images[row], original = load_rectangle(root / names[row], height, width, channels)
        except Exception as error:  # Pillow's plugins raise all kinds of exceptions on a broken file
            return 0, " ".join(str(error).replace(repr(os.fspath(root / names[row])), "").split()) or repr(error)
        return min(original), ""

    bar, sides, faults = ProgressBar("reading", len(names), unit="images"), [], {}
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # about pixel counts, which are checked, and unusual metadata
        for row, (shorter, fault) in enumerate(pool.map(decode, range(len(names)))):
            bar.update(row + 1)
            sides.append(shorter)
            if fault:
                faults[row] = fault
    first = next(iter(faults), 0)
    if len(faults) == len(names):
        raise UserError(f"none of {len(names):,} images can be read; {printable(names[first])}: {faults[first]}")
    readable = [row for row in range(len(names)) if row not in faults]
    small = [names[row] for row in readable if sides[row] < size]
    notes = [f"{len(small):,} smaller than {size} px and enlarged: {format_names(small)}"] if small else []
    notes += (
        [f"{len(faults):,} skipped: {format_names([names[row] for row in faults])} ({faults[first]})"] if faults else []
    )
    return {"kept": readable, "notes": notes, "skipped": faults}


def split_train_test(names: Sequence[str], held_out: float) -> dict[str, tuple[int, list[int]]]:
    """Return split -> (number of images in the test split, its rows in names).

    A name's split does not depend on the other names, except that both splits are everything if one would be empty.
    """
    in_test = [derive_seed("held out", printable(name)) < held_out * 2**63 for name in names]
    rows = {
        "train": [i for i, out in enumerate(in_test) if not out],
        "test": [i for i, out in enumerate(in_test) if out],
    }
    if not all(rows.values()):
        return {split: (0, list(range(len(names)))) for split in rows}
    return {split: (len(rows["test"]), part) for split, part in rows.items()}
