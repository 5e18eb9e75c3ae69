"""What a person gives to sample.py beside words: images, masks, maps, layouts, from files and folders.

A source is made of a path and what is Wanted, looks at its files at once, and is then called with rows, the numbers of images to be drawn.
A folder's files are taken in turn, by name; a single file serves every row.
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


@dataclass(frozen=True)
class InputSpec:
    """What the model takes. size: (height, width) in pixels.  channels: of its images.  classes: of its data."""

    size: tuple[int, int]
    channels: int
    classes: Sequence[str] = ()


@dataclass(frozen=True)
class InputFiles:
    """files: what was given, in turn.  read: one file -> its row."""

    files: Sequence[Path]
    read: Callable[[Path], Any]
    join: Callable[[list[Any]], Any]

    def __call__(self, rows: Sequence[int]) -> Any:
        """The rows (B, ...) of these images."""
        return self.join([self.read(self.files[row % len(self.files)]) for row in rows])

    @property
    def digest(self) -> str:
        """sha256 (hex) of the files' names and contents."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(file.name.encode() + file.read_bytes())
        return total.hexdigest()


def image_input(wanted: InputSpec, path: str | None, key: str = "image", keep_size: bool = False) -> InputFiles:
    """Images (C, H, W) in [-1, 1] at the wanted size, the middle cut out; as they are with whole=True. Raises UserError naming the file."""

    def read(file: Path) -> Tensor:
        picture = decode.composite_alpha(open_image(key, file)).convert("RGB" if wanted.channels == 3 else "L")
        return to_tensor(picture if keep_size else resize_and_crop(picture, wanted.size)) / 127.5 - 1

    return open_input(key, path, read)


def mask_input(wanted: InputSpec, path: str | None, image: str | None, key: str = "mask") -> InputFiles:
    """Masks (1, H, W), 1 where the file is white: to be drawn; cut and scaled as the image is.

    Raises UserError for a mask of another size than its image's, and for one without any white.
    """
    beside = [] if image is None else list_files("image", image)

    def read(file: Path) -> Tensor:
        picture = decode.composite_alpha(open_image(key, file), "black").convert("L")
        for other in beside if len(beside) == 1 else [one for one in beside if one.stem == file.stem]:
            if (size := open_image("image", other).size) != picture.size:
                said = f"{key}={file} is {picture.size[0]}x{picture.size[1]} (width x height), image={other} is {size[0]}x{size[1]}"
                raise UserError(f"{said}: expected one size")
        white = (to_tensor(resize_and_crop(picture, wanted.size)) > 127).float()
        if not white.any():
            raise UserError(f"{key}={file} has no white in it, and white is what is to be drawn: expected some")
        return white

    return open_input(key, path, read)


def label_map(wanted: InputSpec, path: str | None, key: str = "map") -> InputFiles:
    """Maps (H, W) int64 of class numbers, which are the file's grey levels or palette indices, at the wanted size."""

    def read(file: Path) -> Tensor:
        picture = open_image(key, file)
        if picture.mode not in ("L", "P", "1"):
            raise UserError(
                f"{key}={file} is of mode {picture.mode}: expected a grey or palette image whose values are class numbers"
            )
        return to_tensor(resize_and_crop(picture, wanted.size, nearest=True))[0].long()

    return open_input(key, path, read)


def boxes_input(wanted: InputSpec, path: str | None, key: str = "boxes") -> InputFiles:
    """Layouts from json files [[class, left, top, right, bottom], ...], a class by name or number, coordinates in [0, 1]."""

    def read(file: Path) -> list[tuple[float, ...]]:
        try:
            rows = parse_json(file.read_text(encoding="utf-8"))
            layout = []
            for name, *corners in rows:
                kind = wanted.classes.index(name) if name in wanted.classes else int(name)
                layout.append((float(kind), *(float(x) for x in corners)))
            return layout
        except (ValueError, TypeError) as error:
            what = f"expected [[class, left, top, right, bottom], ...] in json ({' '.join(str(error).split())})"
            raise UserError(f"{key}={file}: {what}") from None

    return open_input(key, path, read, (".json",), list)


def keypoints_input(path: str | None, key: str = "points") -> InputFiles:
    """Keypoints from json files [[x, y], null, ...], coordinates in [0, 1], null for what is not seen."""

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
    """(B, ...) of rows (...)."""
    return torch.stack(rows)


def open_input(
    key: str,
    path: str | None,
    read: Callable[[Path], Any],
    endings: Sequence[str] = EXTENSIONS,
    join: Callable[[list[Any]], Any] = stacked,
) -> InputFiles:
    """A Source whose first file was read, so that a mistake is found before a model is loaded."""
    source = InputFiles(list_files(key, path, endings), lru_cache(maxsize=256)(read), join)
    source([0])
    return source


def list_files(key: str, path: str | None, endings: Sequence[str] = EXTENSIONS) -> list[Path]:
    """The file, or the files of a folder by name. Raises UserError naming key and path."""
    if path is None:
        raise UserError(
            f"{key}=FILE must be given for this task, or held_out=true for the held-out images of the run's data"
        )
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix.lower() in endings)
        if not files:
            raise UserError(f"{key}={path}: a folder without files of the kinds {', '.join(endings)}")
        return files
    if not place.is_file():
        raise UserError(f"{key}={path}: no such file or folder")
    return [place]


def open_image(key: str, file: Path) -> Any:
    """The Pillow image of a file, turned as its EXIF says, 16 bits scaled to 8. Raises UserError naming key and file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pixel counts, which are checked, and of odd metadata
        try:
            with decode.open_image(file) as picture:
                return decode.decode_upright(picture)
        except Exception as error:  # Pillow's many plugins raise what they please at a broken file
            reason = " ".join(str(error).replace(repr(str(file)), "").split()) or repr(error)
            raise UserError(f"{key}={file} cannot be read as an image: {reason}") from None


def resize_and_crop(picture: Any, size: tuple[int, int], nearest: bool = False) -> Any:
    """The picture scaled to cover size (height, width) and cut in the middle; nearest: for values that must not be mixed."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS)


def to_tensor(picture: Any) -> Tensor:
    """(C, H, W) float32, 0 to 255, of a Pillow image."""
    return decode.to_tensor(picture, len(picture.getbands())).float()
