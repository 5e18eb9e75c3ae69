"""Files of the web page in the run's folder: uploads, generated images, and the settings stored in their PNGs."""

import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from ldm.io import atomic
from ldm.media.files import sample_files
from ldm.sampling.record import read_reproduction_record


def store_upload(home: Path, data: bytes, suffix: str) -> Path:
    """Save an uploaded file under the hash of its content, where `reproduce` finds it, and return its path."""
    path = home / "given" / f"{hashlib.sha256(data).hexdigest()[:16]}{suffix}"
    if not path.is_file():
        atomic.write_bytes(path, data)
    return path


def list_images(home: Path, most: int = 200) -> list[Path]:
    """List the pictures of the samples generated from a run, newest first; most: maximum number."""
    files = [(file.stat().st_mtime_ns, file) for file in home.glob("samples/*/[0-9]*.png")]
    return [file for _, file in sorted(files, reverse=True)[:most]]


def image_settings(file: Path) -> Mapping[str, Any]:
    """Return the settings stored in a generated image, for display.  Raises UserError if it has none."""
    record = read_reproduction_record(file)
    request_values = record["request"]
    prompts = dict(zip(record["rows"], record["told"], strict=False)).get(record["row"], ["", None])
    task = request_values["task"]["_target_"].rpartition(".")[2]
    shown = {
        "prompt": prompts[0],
        "negative": request_values["negative"],
        "class": request_values["label"],
        "seed": request_values["seed"] + record["row"],
        "task": task,
        **{
            name: value
            for name, value in request_values["task"].items()
            if not name.startswith("_") and value is not None
        },
        "sampler": request_values["sampler"]["_target_"].rpartition(".")[2],
        "steps": request_values["steps"],
        "guidance": request_values["guidance"].get("scale"),
        "batch": len(record["rows"]),
        **{
            name: Path(request_values[name]).name
            for name in record["inputs"]
            if isinstance(request_values.get(name), str)
        },
        "run": Path(request_values["run"]).name,
        "file": str(file),
    }
    return {name: value for name, value in shown.items() if value not in (None, "")}


def zip_files(pictures_by_run: Mapping[str, Sequence[Path]], path: Path) -> Path:
    """Write all files of samples, whose pictures are given by the names of their runs, to one uncompressed archive.

    Returns its path.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, pictures in pictures_by_run.items():
            for file in chain.from_iterable(map(sample_files, pictures)):
                archive.write(file, f"{name}/{file.name}")
    return path
