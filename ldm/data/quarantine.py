"""Images that the last check of a data set could not read."""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from ldm.io.download import cache_dir
from ldm.io.parse import parse_json


def quarantined_rows(path: str | Path) -> Mapping[str, str]:
    """Return name -> fault of the images that the last check of a path could not read.

    Images whose files have changed since are left out. Empty if the path was never checked.
    """
    try:
        faults = parse_json(_quarantine(path).read_text(encoding="utf-8"))["faults"]
    except FileNotFoundError:
        return {}
    return {name: fault for name, (file, *state, fault) in faults.items() if _state(file) == state}


def _quarantine(path: str | Path) -> Path:
    """Return the file with the result of the last check of a path."""
    return (
        cache_dir()
        / "checked"
        / f"{sha256(os.fsencode(os.path.realpath(Path(path).expanduser()))).hexdigest()[:32]}.json"
    )


def _state(file: str) -> list[int]:
    """Return size in bytes and modification time of a file, -1 if it cannot be read."""
    try:
        stat = os.stat(file)
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]
