"""Where a training has the features of captions: in memory, on disk, or nowhere, computed in each step."""

import os
from typing import Any, Literal

import torch
from torch import nn

from ldm.conditioner.features import most_bytes, text_caches
from ldm.data.captions import known_captions, lists_captions
from ldm.errors import UserError
from ldm.io.download import cache_dir
from ldm.training.fit import device_type
from ldm.training.text_features import TextFeatures

Mode = Literal["memory", "disk", "online"]


def check_text_features(mode: Mode, data: Any) -> None:
    """Raise UserError for features on disk of captions that are not known before the first step."""
    if mode == "disk" and not lists_captions(data):
        raise UserError(
            "training.text_features=disk: these data do not list their captions (all_captions), and all are encoded "
            "before the first step; choose memory or online"
        )


def text_features_callbacks(mode: Mode, conditioner: nn.Module, data: Any, rows: int, accelerator: str) -> list[Any]:
    """Return the callback that prepares the features for a training, none for a conditioner without a text encoder.

    rows: samples that the training is still to read.  In memory, captions are encoded ahead only if there are no more
    of them than rows: a shorter training encodes those that it reads.
    Raises UserError if the features of all captions may not fit into memory.
    """
    caches = text_caches(conditioner)
    if not caches:
        return []
    captions = [] if mode == "online" else known_captions(data) or []
    if mode == "memory" and len(captions) > rows:
        captions = []
    needed, total = sum(most_bytes(cache, len(captions)) for cache in caches), memory_of(device_type(accelerator))
    if mode == "memory" and needed > total:
        raise UserError(
            f"training.text_features=memory: the features of {len(captions):,} captions take up to "
            f"{needed / 2**30:,.1f} GiB, and there are {total / 2**30:,.1f} GiB; choose disk or online"
        )
    return [TextFeatures(mode, captions, cache_dir() / "text")]


def memory_of(device: str) -> int:
    """Return the bytes of memory of this process's GPU, or of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
