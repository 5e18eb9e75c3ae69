"""A folder of one's own images: read once, whatever state they are in, captioned by a list, files beside them, folders or names."""

import json
import os
import statistics
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.data.captions import annotate, format_names, printable
from ldm.data.decode import load_rectangle, open_image
from ldm.data.image_cache import cached_memmap
from ldm.data.memory import InMemoryDataset, iter_bytes
from ldm.errors import UserError
from ldm.io.progress import ProgressBar
from ldm.tensors import derive_seed

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
OPTIONAL_EXTENSIONS = (
    ".avif",
    ".heic",
    ".heif",
    ".jxl",
)  # by some Pillows only: where it cannot, they are named as unreadable, not passed over
READER = 3  # raise when `rectangle` comes to give other pixels, so that packs made before are not used
DEFAULT_MAX_SIZE = {True: 256, False: 64}  # size chosen where none is given: with a GPU, without
HEADERS_READ = 200  # files whose headers decide on size and channels
GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")
EXPECTED_LAYOUT = "expected images in it: in a subfolder for each class, or with captions beside them (x.jpg, x.txt), or named by what they show"


class ImageFolder(InMemoryDataset):
    """The images under `path`, hidden ones aside, scaled and cropped at the centre to size x size: image (channels, size, size) in [-1, 1].

    size: by default a power of two from 32 to 64, with a GPU to 256, that half of the images have.  channels: 3, or 1 for grey, by default
    as most images are.  captions: see ldm.data.captions.annotate.  held_out: the part that split=test gets, chosen by each file's name alone;
    where that leaves a split without an image, both have all.  bad: the part of the files that may be unreadable.
    content: the digest of images and captions that are expected.
    Raises UserError naming the path.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int | None = None,
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
        if size is not None and size < 16:
            raise UserError(f"size={size}: expected 16 pixels or more")
        if not 0 <= test_fraction < 1:
            raise UserError(f"test_fraction={test_fraction}: expected a part from 0 up to, not with, 1")
        root = Path(path).expanduser()
        files = scan(root)
        if size is None or channels is None:
            usual = infer_size_and_channels(root, [file.name for file in files])
            size, channels = size or usual[0], channels or usual[1]
        pack = decode_all(root, files, (size, size), channels)
        self.root, self.readable, self.skipped = root, pack.files, pack.skipped
        if len(self.skipped) > max_unreadable * len(files):
            raise UserError(
                f"path={root}: {len(self.skipped):,} of {len(files):,} images cannot be read, more than data.max_unreadable={max_unreadable}: "
                f"{format_names(self.skipped)} ({next(iter(self.skipped.values()))}); mend or remove them, or allow more"
            )
        names = [file.name for file in pack.files]
        told = annotate(root, names, captions)
        part, rows = split_train_test(names, test_fraction)[split]
        self.files, texts = [pack.files[i] for i in rows], [told.texts[i] for i in rows]
        super().__init__(
            f"folder-{split}",
            pack.images,
            torch.tensor(told.labels)[rows],
            told.classes,
            seed,
            flip,
            pack.rows[rows],
            texts,
        )
        self.content = digest(pack, told.texts, told.labels)
        self.check_content(content_hash)
        seen = f"{size} px{'' if channels == 3 else ', grey'}, {'fits in memory' if fits_in_memory(pack.images) else 'read from the disk'}"
        self.summary = ", ".join([f"{root}: {len(names):,} images", *told.notes, seen, f"{part} held out", *pack.notes])

    @property
    def resolved_config(self) -> dict[str, int | str]:
        """What a config that left it open gets by these files; content makes names of runs depend on images and captions."""
        return {"size": self.size, "channels": self.channels, "content_hash": self.content}

    def check_content(self, content: str | None) -> None:
        """Raises UserError for a digest, where one is given, that is not that of images and captions."""
        if content not in (None, self.content):
            raise UserError(
                f"path={self.root}: its images or captions are not those that this run was made with (digest {self.content}, "
                f"then {content}); put them back, or start a new run by its command"
            )


def digest(pack: "DecodedImages", texts: Sequence[Sequence[str]], labels: Sequence[int]) -> str:
    """16 hex digits that depend on every pixel, caption and label."""
    shape = [len(pack.files), *pack.images.shape[1:]]
    total = sha256(json.dumps([shape, list(map(list, texts)), list(labels)]).encode())
    for part in iter_bytes(pack.images, pack.rows):
        total.update(part)
    return total.hexdigest()[:16]


def fits_in_memory(images: Tensor) -> bool:
    """Whether this machine's memory has room for what lies on its disk."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
    return images.nbytes < have


def infer_size_and_channels(root: Path, names: Sequence[str]) -> tuple[int, int]:
    """Size and channels that suit the images, by the headers of some."""
    sides, colour = [], 0
    for name in names[:: -(-len(names) // HEADERS_READ)]:
        try:
            with warnings.catch_warnings(), open_image(root / name) as file:
                warnings.simplefilter("ignore")
                sides.append(min(file.size))
                colour += 1 if file.mode not in GREY_MODES else -1
        except Exception:  # said of when they are read
            continue
    largest = DEFAULT_MAX_SIZE[torch.cuda.is_available()]
    size = max(32, min(largest, 2 ** int(statistics.median(sides)).bit_length() // 2)) if sides else largest
    return size, 3 if colour >= 0 else 1


class File(NamedTuple):
    """An image file: its path below the root, with slashes; bytes and time of change, -1 where it cannot be looked at."""

    name: str
    size: int
    mtime_ns: int


def scan(root: Path) -> list[File]:
    """The image files below root by name, neither hidden nor in hidden folders, links followed. Raises UserError if there are none."""
    if not root.is_dir():
        raise UserError(f"path={root}: {'a file' if root.exists() else 'no such folder'}; {EXPECTED_LAYOUT}")
    found, others, seen = [], 0, set()
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = (
            [] if (real := os.path.realpath(folder)) in seen else [name for name in inner if not name.startswith(".")]
        )
        names = [] if real in seen else [name for name in names if not name.startswith(".")]
        seen.add(real)  # a link may lead back up
        images = [name for name in names if name.lower().endswith(EXTENSIONS + OPTIONAL_EXTENSIONS)]
        found += [_file(root, Path(folder, name)) for name in images]
        others += len(names) - len(images)
    if not found:
        raise UserError(
            f"path={root}: no image in it (.jpg, .png, .webp, ...) among {others:,} files; {EXPECTED_LAYOUT}"
        )
    return sorted(found)


def _file(root: Path, path: Path) -> File:
    name = path.relative_to(root).as_posix()
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere
        return File(name, -1, -1)
    return File(name, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class DecodedImages:
    """What was read of a folder.

    files: the readable ones.  images: (N, C, height, width) uint8, mapped from the disk, of all.  rows: those of the readable ones in it.
    notes: remarks.  skipped: name -> fault of the others.
    """

    files: Sequence[File]
    images: Tensor
    rows: Tensor
    notes: Sequence[str]
    skipped: Mapping[str, str]


def decode_all(root: Path, files: Sequence[File], shape: tuple[int, int], channels: int) -> DecodedImages:
    """The images of these files at (height, width), read now or, where they are the same as then, from the cache.

    Raises UserError if none can be read, or if there is no room for them.
    """
    made_of = (READER, *shape, channels, os.path.realpath(root), *map(tuple, files))
    names = [file.name for file in files]
    try:
        images, said = cached_memmap(
            "folders", made_of, (len(files), channels, *shape), lambda images: decode_into(root, names, images)
        )
    except UserError as error:
        raise UserError(f"path={root}: {error}") from None
    skipped = {names[int(i)]: fault for i, fault in said["skipped"].items()}
    return DecodedImages([files[i] for i in said["kept"]], images, torch.tensor(said["kept"]), said["notes"], skipped)


def decode_into(root: Path, names: Sequence[str], images: Tensor) -> dict:
    """Fill images (N, channels, height, width) uint8 but for the unreadable ones.

    Returns {"kept": places of the others, "notes": [remark], "skipped": {place: fault}}; raises UserError if there is none.
    """
    _, channels, height, width = images.shape
    size = min(height, width)

    def one(place: int) -> tuple[int, str]:
        try:
            images[place], shorter = load_rectangle(root / names[place], height, width, channels)
        except Exception as error:  # Pillow's many plugins raise what they please at a broken file
            return 0, " ".join(str(error).replace(repr(os.fspath(root / names[place])), "").split()) or repr(error)
        return shorter, ""

    bar, sides, faults = ProgressBar("reading", len(names), unit="images"), [], {}
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of pixel counts, which are checked, and of odd metadata
        for place, (shorter, fault) in enumerate(pool.map(one, range(len(names)))):
            bar.update(place + 1)
            sides.append(shorter)
            if fault:
                faults[place] = fault
    first = next(iter(faults), 0)
    if len(faults) == len(names):
        raise UserError(f"none of {len(names):,} images can be read; {printable(names[first])}: {faults[first]}")
    kept = [place for place in range(len(names)) if place not in faults]
    small = [names[place] for place in kept if sides[place] < size]
    notes = [f"{len(small):,} smaller than {size} px and enlarged: {format_names(small)}"] if small else []
    notes += (
        [f"{len(faults):,} skipped: {format_names([names[place] for place in faults])} ({faults[first]})"]
        if faults
        else []
    )
    return {"kept": kept, "notes": notes, "skipped": faults}


def split_train_test(names: Sequence[str], held_out: float) -> dict[str, tuple[int, list[int]]]:
    """split -> (number of images held out, its places in names); a name's split does not depend on the others, save where one is empty."""
    aside = [derive_seed("held out", printable(name)) < held_out * 2**63 for name in names]
    rows = {"train": [i for i, out in enumerate(aside) if not out], "test": [i for i, out in enumerate(aside) if out]}
    if not all(rows.values()):
        return {split: (0, list(range(len(names)))) for split in rows}
    return {split: (len(rows["test"]), places) for split, places in rows.items()}
