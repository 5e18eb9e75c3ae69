"""A folder of one's own images: read once, whatever state they are in, captioned by what lies beside them, their folders or their names."""

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.data.kept import kept
from ldm.data.memory import InMemory, read_captions
from ldm.errors import UserError
from ldm.progress import Bar
from ldm.tensors import key

OPENED = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
HOPED = (".avif", ".heic", ".heif", ".jxl")  # by some Pillows only: where it cannot, they are named as unreadable, not passed over
MAX_PIXELS = 100_000_000  # of one file; a picture of 48 kB can unpack to gigabytes
READER = 1  # raise when `square` comes to give other pixels, so that packs made before are not used
TEMPLATES = ("{}", "a photo of {}", "a picture of {}")
CAMERA = {"img", "image", "dsc", "dscn", "dscf", "pxl", "mvi", "gopr", "photo", "picture", "pic", "screenshot", "untitled", "wa", "copy"}
SHOWN = 500  # captions that speak for the whole folder where there are no classes
EXPECTED = "expected images in it: in a subfolder for each class, or with captions beside them (x.jpg, x.txt), or named by what they show"


class Folder(InMemory):
    """The images under `path`, hidden ones aside, scaled and cropped at the centre to size x size: image (channels, size, size) in [-1, 1].

    A caption is a line of the .txt, or "caption" in the .json, of the image's name and place; else, where all images lie in subfolders,
    that of its class, the uppermost folder's name in a few templates or as in `captions`, a JSON file {class: [caption, ...]}; else the
    words of the file name.  Without classes all are of one, `image`.  held_out: the part that split=test gets, chosen by each file's name
    alone; where that leaves a split without an image, both have all.  Raises UserError naming the path.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        size: int = 64,
        channels: int = 3,
        captions: str | Path | None = None,
        held_out: float = 0.02,
        seed: int = 0,
        flip: bool = True,
    ):
        if split not in ("train", "test"):
            raise UserError(f"split={split!r}: expected train or test")
        if channels not in (1, 3):
            raise UserError(f"channels={channels}: expected 3 for colour or 1 for grey")
        if size < 16:
            raise UserError(f"size={size}: expected 16 pixels or more")
        if not 0 <= held_out < 1:
            raise UserError(f"held_out={held_out}: expected a part from 0 up to, not with, 1")
        root = Path(path).expanduser()
        pack = packed(root, scan(root), size, channels)
        told = tell(root, pack.names, captions)
        part, rows = shares(pack.names, held_out)[split]
        self.texts = [told.texts[i] for i in rows]
        super().__init__(f"folder-{split}", pack.images[rows], torch.tensor(told.labels)[rows], told.classes, seed, flip)
        self.summary = ", ".join([f"{root}: {len(pack.names):,} images", *told.notes, f"{part} held out", *pack.notes])
        if split == "train" and os.environ.get("RANK", "0") == "0":
            print(self.summary, flush=True)

    def caption(self, place: int, index: int) -> str:
        """One of the image's captions."""
        texts = self.texts[index]
        return texts[key(self.seed, "caption", place, index) % len(texts)]


class File(NamedTuple):
    """An image file: its path below the root, with slashes; bytes and time of change, -1 where it cannot be looked at."""

    name: str
    size: int
    mtime_ns: int


def scan(root: Path) -> list[File]:
    """The image files below root by name, neither hidden nor in hidden folders, links followed. Raises UserError if there are none."""
    if not root.is_dir():
        raise UserError(f"path={root}: {'a file' if root.exists() else 'no such folder'}; {EXPECTED}")
    found, others, seen = [], 0, set()
    for folder, inner, names in os.walk(root, followlinks=True):
        inner[:] = [] if (real := os.path.realpath(folder)) in seen else [name for name in inner if not name.startswith(".")]
        names = [] if real in seen else [name for name in names if not name.startswith(".")]
        seen.add(real)  # a link may lead back up
        images = [name for name in names if name.lower().endswith(OPENED + HOPED)]
        found += [_file(root, Path(folder, name)) for name in images]
        others += len(names) - len(images)
    if not found:
        raise UserError(f"path={root}: no image in it (.jpg, .png, .webp, ...) among {others:,} files; {EXPECTED}")
    return sorted(found)


def _file(root: Path, path: Path) -> File:
    name = path.relative_to(root).as_posix()
    try:
        stat = path.stat()
    except OSError:  # a link to nowhere
        return File(name, -1, -1)
    return File(name, stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Pack:
    """What was read of a folder: names of the readable images, images (N, C, size, size) uint8, remarks on the rest."""

    names: Sequence[str]
    images: Tensor
    notes: Sequence[str]


def packed(root: Path, files: Sequence[File], size: int, channels: int) -> Pack:
    """The images of these files, read now or, where they are the same as then, from the cache.

    Raises UserError if none can be read, or if they do not fit in memory.
    """
    need = 2 * len(files) * channels * size**2 / 2**30  # twice: whole, and as this split's rows
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else float("inf")
    if need > have:
        raise UserError(f"path={root}: {len(files):,} images of {size} px take {need:.0f} GiB of memory, not {have:.0f}; lower size")
    made_of = (READER, size, channels, os.path.realpath(root), *map(tuple, files))
    images, said = kept("folders", made_of, lambda: read(root, [file.name for file in files], size, channels))
    return Pack([files[i].name for i in said["kept"]], images, said["notes"])


def read(root: Path, names: Sequence[str], size: int, channels: int) -> tuple[Tensor, dict]:
    """Images (N, channels, size, size) uint8 of the readable ones; {"kept": their places in names, "notes": [remark, ...]}.

    Raises UserError if there is none.
    """
    images = torch.empty(len(names), channels, size, size, dtype=torch.uint8)

    def one(place: int) -> tuple[int, str]:
        try:
            images[place], shorter = square(root / names[place], size, channels)
        except Exception as error:  # Pillow's many plugins raise what they please at a broken file
            return 0, " ".join(str(error).replace(repr(os.fspath(root / names[place])), "").split()) or repr(error)
        return shorter, ""

    bar, sides, faults = Bar("reading", len(names), unit="images"), [], {}
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")  # of pixel counts, which are checked, and of odd metadata
        for place, (shorter, fault) in enumerate(pool.map(one, range(len(names)))):
            bar.at(place + 1)
            sides.append(shorter)
            if fault:
                faults[place] = fault
    first = next(iter(faults), 0)
    if len(faults) == len(names):
        raise UserError(f"path={root}: none of {len(names):,} images can be read; {shown(names[first])}: {faults[first]}")
    kept = [place for place in range(len(names)) if place not in faults]
    small = [names[place] for place in kept if sides[place] < size]
    notes = [f"{len(small):,} smaller than {size} px and enlarged: {some(small)}"] if small else []
    notes += [f"{len(faults):,} unreadable: {some([names[place] for place in faults])} ({faults[first]})"] if faults else []
    return (images[kept] if faults else images), {"kept": kept, "notes": notes}


def square(path: Path, size: int, channels: int) -> tuple[Tensor, int]:
    """An image file as (channels, size, size) uint8, its shorter side scaled and its middle cut out, and that side in pixels.

    Turned as its EXIF says, laid on white where transparent, 16 bits scaled to 8. Raises what Pillow raises, and ValueError for what it
    would get wrong.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        width, height = file.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width}x{height} is above {MAX_PIXELS // 10**6} megapixels")
        file.draft(None, (2 * size, 2 * size))  # JPEG: decode at half, a quarter or an eighth of the scale where that is enough
        image = eight_bit(ImageOps.exif_transpose(file))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return torch.from_numpy(np.array(image)).reshape(size, size, channels).permute(2, 0, 1), min(width, height)


def eight_bit(image):
    """A Pillow image of 16-bit grey as 8-bit grey, any other as it is. Raises ValueError for floats and wider numbers."""
    import numpy as np
    from PIL import Image

    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("floating-point or 32-bit values, whose white is anyone's guess; save it with 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


@dataclass(frozen=True)
class Told:
    """What is said of N images: captions of each, labels, {class: captions}, remarks."""

    texts: Sequence[Sequence[str]]
    labels: Sequence[int]
    classes: dict[str, list[str]]
    notes: Sequence[str]


def tell(root: Path, names: Sequence[str], captions: str | Path | None = None) -> Told:
    """Captions and classes of the named images, as Folder says. Raises UserError for a `captions` file that does not fit."""
    beside = [lines_beside(root / name) for name in names]
    folders = [shown(name.split("/")[0]) if "/" in name else "" for name in names]
    if captions is not None and (any(beside) or not all(folders)):
        raise UserError(f"captions={captions} gives captions to classes, but {root} holds no class subfolders alone; leave it null")
    if not any(beside) and all(folders):
        classes = _classes(sorted(set(folders)), captions)
        label = {name: i for i, name in enumerate(classes)}
        return Told([classes[name] for name in folders], [label[name] for name in folders], classes, [f"{len(classes):,} classes"])
    texts = [lines or [words(Path(name).stem)] for name, lines in zip(names, beside, strict=True)]
    bare = [name for name, one in zip(names, texts, strict=True) if one == [""]]
    notes = ["captions beside them" if any(beside) else "captions from their names"]
    notes += [f"{len(bare):,} without caption: {some(bare)}"] if bare else []
    every = list(dict.fromkeys(text for one in texts for text in one if text)) or [""]
    return Told(texts, [0] * len(names), {"image": every[:: -(-len(every) // SHOWN)]}, notes)


def _classes(names: Sequence[str], captions: str | Path | None) -> dict[str, list[str]]:
    if captions is None:
        return {name: [text.format(words(name) or name) for text in TEMPLATES] for name in names}
    try:
        given = read_captions(Path(captions).expanduser())
    except (OSError, ValueError) as error:
        raise UserError(f"captions={captions}: {error}") from None
    if missing := [name for name in names if not given.get(name)]:
        raise UserError(f"captions={captions}: nothing on {some(missing)}; expected a caption or more on each of {len(names)} subfolders")
    return {name: given[name] for name in names}


def lines_beside(path: Path) -> list[str]:
    """The captions beside an image, one a line of its .txt, else those of "caption" in its .json; empty without any."""
    for suffix, parse in ((".txt", str.splitlines), (".json", _caption)):
        try:
            lines = parse(path.with_suffix(suffix).read_text(encoding="utf-8-sig", errors="replace"))
        except OSError:
            continue
        if lines := [line for line in (" ".join(line.split()) for line in lines) if line]:
            return lines
    return []


def _caption(text: str) -> list[str]:
    try:
        value = json.loads(text)
    except ValueError:
        return []
    value = value.get("caption") if isinstance(value, dict) else None
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]


def words(name: str) -> str:
    """What a file's name says: its words, without numbers, codes and what cameras write; "red_car-2 (copy)" is "red car"."""
    parts = (re.fullmatch(r"([^\W\d_]+)\d*", part) for part in re.split(r"[\W_]+", shown(name)))
    return " ".join(part[1] for part in parts if part and part[1].lower() not in CAMERA)


def shares(names: Sequence[str], held_out: float) -> dict[str, tuple[int, list[int]]]:
    """split -> (number of images held out, its places in names); a name's split does not depend on the others, save where one is empty."""
    aside = [key("held out", shown(name)) < held_out * 2**63 for name in names]
    rows = {"train": [i for i, out in enumerate(aside) if not out], "test": [i for i, out in enumerate(aside) if out]}
    if not all(rows.values()):
        return {split: (0, list(range(len(names)))) for split in rows}
    return {split: (len(rows["test"]), places) for split, places in rows.items()}


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names."""
    names = [shown(name) for name in names]
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def shown(name: str) -> str:
    """A file's name as text that can be printed and encoded, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")
