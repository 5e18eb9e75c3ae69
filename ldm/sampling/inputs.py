"""The files that a user gives to sample.py besides text: images, masks, maps, layouts, keypoints.

A reader (`InputFiles`) is made of a path and an `InputSpec`. It reads its first file at once, so that a mistake is
reported before a model is loaded, and is then called with rows, the numbers of the images to sample. The files of a
folder are used in turn, by name; a single file serves every row.
"""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data import decode
from ldm.data.folder import EXTENSIONS
from ldm.errors import UserError
from ldm.io.parse import parse_json

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


@dataclass(frozen=True)
class InputSpec:
    """The form of a model's inputs.

    size: (height, width) of the images in pixels.  channels: of the images.  classes: the names of the data's classes.
    """

    size: tuple[int, int]
    channels: int
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class InputFiles:
    """A reader of input files.  files: used in turn.  read: one file -> one row.  join: rows -> a batch (B, ...)."""

    files: Sequence[Path]
    read: Callable[[Path], Any]
    join: Callable[[list[Any]], Any]

    def __call__(self, rows: Sequence[int]) -> Any:
        """Return the rows (B, ...) of the images with these numbers."""
        return self.join([self.read(self.files[row % len(self.files)]) for row in rows])

    @property
    def digest(self) -> str:
        """Return the sha256 (hex) of the files' names and contents."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(file.name.encode() + file.read_bytes())
        return total.hexdigest()


def image_input(spec: InputSpec, path: str | None, key: str = "image", keep_size: bool = False) -> InputFiles:
    """Return a reader of images (C, H, W) in [-1, 1], scaled and center-cropped to the spec's size, or of their own
    size.

    path: a file or a folder.  key: the option that gave it.  keep_size: whether images stay at their own size.
    Raises UserError naming the file.
    """

    def read(file: Path) -> Tensor:
        picture = open_image(key, file)
        picture = picture.convert("RGBA") if spec.channels == 4 else decode.composite_alpha(picture)
        picture = picture.convert(MODES[spec.channels])
        return to_tensor(picture if keep_size else resize_and_crop(picture, spec.size)) / 127.5 - 1

    return open_input(key, path, read)


def mask_input(spec: InputSpec, path: str | None, image: str | None, key: str = "mask") -> InputFiles:
    """Return a reader of masks (1, H, W), 1 where the file is white, which is to be sampled; scaled and cropped as the
    image is.

    image: the file or folder of the images; in a folder, a mask belongs to the image of the same stem.
    Raises UserError for a mask of another size than its image, and for a mask without any white.
    """
    images = [] if image is None else list_files("image", image)

    def read(file: Path) -> Tensor:
        picture = decode.composite_alpha(open_image(key, file), "black").convert("L")
        for other in images if len(images) == 1 else [candidate for candidate in images if candidate.stem == file.stem]:
            if (size := open_image("image", other).size) != picture.size:
                sizes = f"is {picture.size[0]}x{picture.size[1]} (width x height), image={other} is {size[0]}x{size[1]}"
                raise UserError(f"{key}={file} {sizes}: expected one size")
        white = (to_tensor(resize_and_crop(picture, spec.size)) > 127).float()
        if not white.any():
            raise UserError(f"{key}={file} has no white in it, and white marks what is to be sampled: expected some")
        return white

    return open_input(key, path, read)


def label_map(spec: InputSpec, path: str | None, key: str = "map") -> InputFiles:
    """Return a reader of maps (H, W) int64 of class numbers at the spec's size.

    A class number is the file's grey level or palette index. Raises UserError for a file of another mode.
    """

    def read(file: Path) -> Tensor:
        picture = open_image(key, file)
        if picture.mode not in ("L", "P", "1"):
            raise UserError(
                f"{key}={file} is of mode {picture.mode}: "
                "expected a grey or palette image whose values are class numbers"
            )
        return to_tensor(resize_and_crop(picture, spec.size, nearest=True))[0].long()

    return open_input(key, path, read)


def boxes_input(spec: InputSpec, path: str | None, key: str = "boxes") -> InputFiles:
    """Return a reader of layouts from json files [[class, left, top, right, bottom], ...].

    A class is given by name or number; coordinates are in [0, 1]. Raises UserError naming the file.
    """

    def read(file: Path) -> list[tuple[float, ...]]:
        try:
            rows = parse_json(file.read_text(encoding="utf-8"))
            layout = []
            for name, *corners in rows:
                kind = spec.classes.index(name) if name in spec.classes else int(name)
                layout.append((float(kind), *(float(x) for x in corners)))
            return layout
        except (ValueError, TypeError) as error:
            what = f"expected [[class, left, top, right, bottom], ...] in json ({' '.join(str(error).split())})"
            raise UserError(f"{key}={file}: {what}") from None

    return open_input(key, path, read, (".json",), list)


def keypoints_input(path: str | None, key: str = "points") -> InputFiles:
    """Return a reader of keypoints from json files [[x, y], null, ...], coordinates in [0, 1], null for a point that is
    not visible.

    Raises UserError naming the file.
    """

    def read(file: Path) -> list[tuple[float, float] | None]:
        try:
            return [
                None if point is None else (float(point[0]), float(point[1]))
                for point in parse_json(file.read_text(encoding="utf-8"))
            ]
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise UserError(
                f"{key}={file}: expected [[x, y], null, ...] in json ({' '.join(str(error).split())})"
            ) from None

    return open_input(key, path, read, (".json",), list)


def stacked(rows: list[Tensor]) -> Tensor:
    """Stack rows (...) to a batch (B, ...)."""
    return torch.stack(rows)


def open_input(
    key: str,
    path: str | None,
    read: Callable[[Path], Any],
    endings: Sequence[str] = EXTENSIONS,
    join: Callable[[list[Any]], Any] = stacked,
) -> InputFiles:
    """Return the reader of a file or folder after reading its first file, so that a mistake is reported before a model
    is loaded.
    """
    files = InputFiles(list_files(key, path, endings), lru_cache(maxsize=256)(read), join)
    files([0])
    return files


def list_files(key: str, path: str | None, endings: Sequence[str] = EXTENSIONS) -> list[Path]:
    """Return the file, or the files of a folder sorted by name. Raises UserError naming key and path."""
    if path is None:
        raise UserError(
            f"{key}=FILE must be given for this task, or held_out=true for the held-out images of the run's data"
        )
    location = Path(path).expanduser()
    if location.is_dir():
        files = sorted(file for file in location.iterdir() if file.suffix.lower() in endings)
        if not files:
            raise UserError(f"{key}={path}: a folder without files of the kinds {', '.join(endings)}")
        return files
    if not location.is_file():
        raise UserError(f"{key}={path}: no such file or folder")
    return [location]


def open_image(key: str, file: Path) -> Any:
    """Open an image with Pillow, rotated according to its EXIF data, 16 bits scaled to 8.

    Raises UserError naming key and file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pixel counts, which are checked, and about odd metadata
        try:
            with decode.open_image(file) as picture:
                return decode.decode_upright(picture)
        except Exception as error:  # Pillow's plugins raise exceptions of many types for a broken file
            reason = " ".join(str(error).replace(repr(str(file)), "").split()) or repr(error)
            raise UserError(f"{key}={file} cannot be read as an image: {reason}") from None


def resize_and_crop(picture: Any, size: tuple[int, int], nearest: bool = False) -> Any:
    """Scale a Pillow image to cover size (height, width) and crop its centre.

    nearest: interpolate by nearest neighbour, for values that must not be mixed, such as class numbers.
    """
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)


def to_tensor(picture: Any) -> Tensor:
    """Convert a Pillow image to a tensor (C, H, W) float32 in [0, 255]."""
    return decode.to_tensor(picture, len(picture.getbands())).float()
