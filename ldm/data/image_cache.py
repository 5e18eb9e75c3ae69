"""Images that were decoded once and are mapped from the cache."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.memmap import create_memmap, open_memmap
from ldm.errors import UserError
from ldm.io.atomic import CorruptFileError, write_json, write_tensors
from ldm.io.download import cache_dir
from ldm.io.parse import parse_json


def cached(room: str, made_of: object, make: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """What make() gives, a tensor and plain data on it; from the folder `room` of the cache where that has what was made of the same.

    made_of: something whose repr says all that determines the result.  Any number of processes may ask at once: the first makes it.
    """
    with _place(room, made_of) as path:
        try:
            return open_memmap(path, "images"), json.loads(bytes(open_memmap(path, "said").tolist()))
        except (FileNotFoundError, CorruptFileError):
            images, said = make()
            write_tensors(
                path, {"images": images, "said": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)}
            )
            return images, json.loads(json.dumps(said))


def cached_memmap(
    room: str, made_of: object, shape: Sequence[int], fill: Callable[[Tensor], Any]
) -> tuple[Tensor, Any]:
    """As kept, for uint8 images of a known shape (N, C, H, W), which never lie in memory: fill(images) writes them, and says what it says.

    Raises UserError where the disk has no room for them.
    """
    with _place(room, made_of) as path:
        said = path.with_suffix(".json")
        try:
            return open_memmap(path, "images"), parse_json(said.read_text(encoding="utf-8"))
        except (FileNotFoundError, CorruptFileError, ValueError):
            need, free = (one / 2**30 for one in (torch.Size(shape).numel(), shutil.disk_usage(path.parent).free))
            if need > free:
                which = f"{shape[0]:,} images of {shape[2]}x{shape[3]}"
                raise UserError(f"{which} take {need:,.1f} GiB, {path.parent} has {free:,.1f}; lower size") from None
            with create_memmap(path, "images", "U8", shape, {}) as images:
                write_json(said, fill(images))
            return open_memmap(path, "images"), parse_json(said.read_text(encoding="utf-8"))


@contextmanager
def _place(room: str, made_of: object) -> Iterator[Path]:
    """Where in the cache something is kept, held against other processes within the block."""
    from filelock import FileLock

    path = cache_dir() / room / f"{sha256(os.fsencode(repr(made_of))).hexdigest()[:32]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield path
