"""Find, recognize and lock run folders."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import UserError
from ldm.interop.folder import is_folder

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".bin")
PLAYERS = "players"  # the folder, in a run's, of files beside its sample grids: sounds, clips, ...


def is_external(run: str | Path) -> bool:
    """Return whether `run` is a pipeline folder of diffusers, or a weights file outside a run folder."""
    path = Path(run).expanduser()
    if path.is_dir():
        return is_folder(path)
    inside = any(
        (above / "config.yaml").is_file() and (above / "data.json").is_file() for above in path.absolute().parents
    )
    return path.is_file() and path.suffix in WEIGHT_SUFFIXES and not inside


def find_run(run: str | Path) -> Path:
    """Return the run folder that `run` refers to.

    run: a run folder, a file or checkpoint in it, or a folder of runs, of which the newest is taken. An external model
        (see `is_external`) is returned as it is.
    Raises UserError with what was expected.
    """
    path = Path(run).expanduser()
    if is_external(path):
        return path
    if not path.exists():
        near = sorted(str(p.parent) for p in path.parent.glob("*/config.yaml")) if path.parent.is_dir() else []
        hint = "; existing ones: " + ", ".join(near[:5]) if near else ""
        raise UserError(f"run={run}: no such folder{hint}; expected a run folder of train.py")
    for folder in (path, *path.parents):
        if is_run_folder(folder):
            return folder
    if inside := list_runs(path):
        return inside[0]
    raise UserError(
        f"run={run}: not a run folder (no config.yaml and data.json in it), nor a folder of runs; "
        "expected the run folder of a diffusion model, created by train.py"
    )


def list_runs(folder: Path) -> list[Path]:
    """List the run folders of diffusion models directly in a folder, newest first."""
    return sorted(filter(is_run_folder, folder.glob("*")), key=lambda one: -(one / "config.yaml").stat().st_mtime)


def is_run_folder(folder: Path) -> bool:
    """Return whether a folder is the run folder of a diffusion model."""
    return (folder / "config.yaml").is_file() and (folder / "data.json").is_file()


@contextmanager
def lock_run(folder: Path | str) -> Iterator[None]:
    """Lock a run folder while the block runs; the lock ends with its process.  Raises UserError if it is locked."""
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    holder = folder / ".lock.pid"
    try:
        lock.acquire()
    except Timeout:
        who = f" by process {holder.read_text()}" if holder.is_file() else ""
        raise UserError(f"{folder} is in use{who}; wait for it, or give this run another seed= or name=") from None
    try:
        holder.write_text(str(os.getpid()))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()
