"""Images that were decoded once and are read back from the cache."""

import json
import os
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ldm.durable import DamagedError, read_tensors, write_tensors
from ldm.fetch import cache_dir


def kept(room: str, made_of: object, make: Callable[[], tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    """What make() gives, a tensor and plain data on it; from the folder `room` of the cache where that has what was made of the same.

    made_of: something whose repr says all that determines the result.  Any number of processes may ask at once: the first makes it.
    """
    from filelock import FileLock

    path = cache_dir() / room / f"{sha256(os.fsencode(repr(made_of))).hexdigest()[:32]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        try:
            state = read_tensors(path)
        except (FileNotFoundError, DamagedError):
            images, said = make()
            state = {"images": images, "said": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)}
            write_tensors(path, state)
    return state["images"], json.loads(bytes(state["said"].tolist()))
