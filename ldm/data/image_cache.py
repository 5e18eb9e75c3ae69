"""A cache of decoded images, which are mapped from the disk."""

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


def cached(room: str, key: object, create: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """Return create()'s result, a tensor and plain data about it, from the cache if it has one for this key.

    room: folder in the cache.  key: an object whose repr determines the result.
    Several processes may ask at once: the first creates it.
    """
    with _locked_file(room, key) as path:
        try:
            return open_memmap(path, "images"), json.loads(bytes(open_memmap(path, "said").tolist()))
        except (FileNotFoundError, CorruptFileError):
            images, info = create()
            write_tensors(
                path, {"images": images, "said": torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8)}
            )
            return images, json.loads(json.dumps(info))


def cached_memmap(room: str, key: object, shape: Sequence[int], fill: Callable[[Tensor], Any]) -> tuple[Tensor, Any]:
    """Cache uint8 images of a known shape (N, C, H, W) as `cached` does, without having all in memory.

    fill: writes the images into a tensor on the disk, and returns plain data about them.
    Raises UserError if the disk has no room for them.
    """
    with _locked_file(room, key) as path:
        info = path.with_suffix(".json")
        try:
            return open_memmap(path, "images"), parse_json(info.read_text(encoding="utf-8"))
        except (FileNotFoundError, CorruptFileError, ValueError):
            need, free = (size / 2**30 for size in (torch.Size(shape).numel(), shutil.disk_usage(path.parent).free))
            if need > free:
                which = f"{shape[0]:,} images of {shape[2]}x{shape[3]}"
                raise UserError(f"{which} take {need:,.1f} GiB, {path.parent} has {free:,.1f}; lower size") from None
            with create_memmap(path, "images", "U8", shape, {}) as images:
                write_json(info, fill(images))
            return open_memmap(path, "images"), parse_json(info.read_text(encoding="utf-8"))


@contextmanager
def _locked_file(room: str, key: object) -> Iterator[Path]:
    """Yield the path of a cache entry, locked against other processes within the block."""
    from filelock import FileLock

    path = cache_dir() / room / f"{sha256(os.fsencode(repr(key))).hexdigest()[:32]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        yield path
