"""Run folders: finding, recognising and locking them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError
from ldm.interop.folder import is_folder

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")


def is_external(run: str | Path) -> bool:
    """Whether `run` names a pipeline folder of diffusers, or a weights file outside a run folder."""
    path = Path(run).expanduser()
    if path.is_dir():
        return is_folder(path)
    inside = any(
        (above / "config.yaml").is_file() and (above / "data.json").is_file() for above in path.absolute().parents
    )
    return path.is_file() and path.suffix in WEIGHT_SUFFIXES and not inside


def find_run(run: str | Path) -> Path:
    """The run folder that `run` names: itself, by a file or step in it, or as the newest in it; what is foreign (ldm.checkpoint.external) is its own.

    Raises UserError with what was expected.
    """

    path = Path(run).expanduser()
    if is_external(path):
        return path
    if not path.exists():
        near = sorted(str(p.parent) for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        raise UserError(
            f"run={run}: no such folder{'; there are ' + ', '.join(near[:5]) if near else ''}; expected one that train.py made"
        )
    for folder in (path, *path.parents):
        if is_run_folder(folder):
            return folder
    if inside := list_runs(path):
        return inside[0]
    raise UserError(
        f"run={run}: not a run folder (no config.yaml and data.json in it), nor a folder of such; "
        "expected one that train.py made for a diffusion model"
    )


def list_runs(folder: Path) -> list[Path]:
    """List the run folders of diffusion models directly in a folder, the newest first."""
    return sorted(filter(is_run_folder, folder.glob("*")), key=lambda one: -(one / "config.yaml").stat().st_mtime)


def is_run_folder(folder: Path) -> bool:
    """Whether train.py made this folder, for a diffusion model."""
    return (folder / "config.yaml").is_file() and (folder / "data.json").is_file()


@contextmanager
def lock_run(folder: Path | str) -> Iterator[None]:
    """Hold a run folder; a second holder gets UserError.  A holder that dies lets go."""
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock", timeout=0)
    holder = folder / ".lock.pid"
    try:
        held.acquire()
    except Timeout:
        who = f" by process {holder.read_text()}" if holder.is_file() else ""
        raise UserError(f"{folder} is in use{who}; wait for it, or give this run another seed= or name=") from None
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()
