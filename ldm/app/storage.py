"""Files of the page, in the run's folder: what was given, what was made, and what its PNG says of how."""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.io import atomic
from ldm.sampling import request


def store_upload(home: Path, data: bytes, suffix: str) -> Path:
    """A file that a person gave, kept under the hash of its content, where `again` finds it."""
    path = home / "given" / f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    if not path.is_file():
        atomic.write_bytes(path, data)
    return path


def list_images(home: Path, most: int = 200) -> list[Path]:
    """The images that were drawn from a run, the newest first."""
    files = [(file.stat().st_mtime_ns, file) for file in home.glob("samples/*/[0-9]*.png")]
    return [file for _, file in sorted(files, reverse=True)[:most]]


def image_settings(file: Path) -> Mapping[str, Any]:
    """What a drawn image says of how it was made, for people. Raises UserError for one that says nothing."""
    carried = request.read_reproduction_record(file)
    asked = carried["request"]
    told = dict(zip(carried["rows"], carried["told"], strict=False)).get(carried["row"], ["", None])
    task = asked["task"]["_target_"].rpartition(".")[2]
    shown = {
        "prompt": told[0],
        "negative": asked["negative"],
        "class": asked["label"],
        "seed": asked["seed"] + carried["row"],
        "task": task,
        **{name: value for name, value in asked["task"].items() if not name.startswith("_") and value is not None},
        "sampler": asked["sampler"]["_target_"].rpartition(".")[2],
        "steps": asked["steps"],
        "guidance": asked["guidance"].get("scale"),
        "batch": len(carried["rows"]),
        **{name: Path(asked[name]).name for name in carried["inputs"] if isinstance(asked.get(name), str)},
        "run": Path(asked["run"]).name,
        "file": str(file),
    }
    return {name: value for name, value in shown.items() if value not in (None, "")}


def zip_files(drawn: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """Files by the names of their runs in one archive, as they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, files in drawn.items():
            for file in files:
                archive.write(file, f"{name}/{file.name}")
    return path
