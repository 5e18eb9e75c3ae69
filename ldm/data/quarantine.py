"""Images that the last check of a data set found unreadable."""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from ldm.io.download import cache_dir
from ldm.io.parse import parse_json


def quarantined_rows(place: str | Path) -> Mapping[str, str]:
    """Name -> fault of what the last check of a place found, less what has changed since; empty for one that was never checked."""
    try:
        faults = parse_json(_quarantine(place).read_text(encoding="utf-8"))["faults"]
    except FileNotFoundError:
        return {}
    return {name: fault for name, (file, *state, fault) in faults.items() if _state(file) == state}


def _quarantine(place: str | Path) -> Path:
    return (
        cache_dir()
        / "checked"
        / f"{sha256(os.fsencode(os.path.realpath(Path(place).expanduser()))).hexdigest()[:32]}.json"
    )


def _state(file: str) -> list[int]:
    """Bytes and time of change of a file, -1 where it cannot be looked at."""
    try:
        stat = os.stat(file)
    except OSError:
        return [-1, -1]
    return [stat.st_size, stat.st_mtime_ns]
