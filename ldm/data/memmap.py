"""One large tensor as a safetensors file, written in pieces and mapped from the disk: it need not fit in memory."""

import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.io.atomic import CorruptFileError, remove_stale_temporaries

DTYPES = {"F16": np.float16, "F32": np.float32, "U8": np.uint8, "I16": np.int16, "I64": np.int64}


@contextmanager
def create_memmap(
    path: Path, name: str, dtype: str, shape: Sequence[int], metadata: Mapping[str, str]
) -> Iterator[Tensor]:
    """Create an empty tensor on the disk, to be filled within the block; if that does not raise, it becomes `path`.

    dtype: one of DTYPES.
    """
    count = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
    header = {"__metadata__": dict(metadata), name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, count]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_temporaries(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
        array = np.memmap(temporary, DTYPES[dtype], "r+", 8 + len(text), tuple(shape))  # makes the file as long
        yield torch.from_numpy(array)
        array.flush()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_memmap(path: Path, name: str) -> Tensor:
    """Map a tensor of a safetensors file from the disk; writing to it leaves the file unchanged.

    Raises CorruptFileError naming the file.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entry = json.loads(file.read(min(length, size)))[name]
        low, high = (8 + length + offset for offset in entry["data_offsets"])
        if high > size:
            raise ValueError(f"{size} bytes of {high}")
        return torch.from_numpy(np.memmap(path, DTYPES[entry["dtype"]], "c", low, tuple(entry["shape"])))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path} is not a whole safetensors file with {name!r} ({error}); remove it, and it is created again"
        ) from None
