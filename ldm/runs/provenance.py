"""Record the origin of a run: git commit, local changes, packages, console output."""

import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from ldm.io import atomic


def provenance(root: Path | str) -> dict[str, Any]:
    """Describe the origin of a result: command line, git commit of `root`, whether files differ, versions, machine."""
    packages = {}
    for name in (
        "torch",
        "lightning",
        "torchmetrics",
        "hydra-core",
        "omegaconf",
        "safetensors",
        "open-clip-torch",
        "numpy",
    ):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),  # as typed: Hydra receives a modified sys.argv
        "commit": _git(root, "rev-parse", "HEAD"),
        "changed": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": packages,
    }


def git_commit(root: Path | str) -> str:
    """Return the git commit of `root`: 12 hex digits, and + if files differ from it; an empty string without git."""
    origin = provenance(root)
    return f"{origin['commit'][:12]}{'+' if origin['changed'] else ''}" if origin["commit"] else ""


def write_provenance(folder: Path | str, root: Path | str) -> None:
    """Write provenance.json, changes.diff (against the commit of `root`) and environment.txt (package versions)."""
    folder = Path(folder)
    atomic.write_json(folder / "provenance.json", provenance(root))
    atomic.write_text(folder / "changes.diff", git_diff(root))
    atomic.write_text(folder / "environment.txt", "\n".join(installed_packages()) + "\n")


@cache
def installed_packages() -> tuple[str, ...]:
    """Return name==version of every installed package, sorted.  They are read once in a process."""
    packages = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    return tuple(sorted(packages, key=str.lower))


@contextmanager
def tee_output(path: Path | str) -> Iterator[None]:
    """Copy what this process prints, and the traceback that ends it, to a file as well; progress bars are left out."""
    before = sys.stdout, sys.stderr
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}\n")
        sys.stdout, sys.stderr = (_Tee(stream, file) for stream in before)  # type: ignore[assignment]
        try:
            yield
        except BaseException as error:
            file.write("".join(traceback.format_exception(error)))
            raise
        finally:
            sys.stdout, sys.stderr = before


class _Tee:
    """A text stream that also copies its lines to a file."""

    def __init__(self, stream: Any, file: TextIO):
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text and not self.file.closed:
            self.file.write(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def git_diff(root: Path | str) -> str:
    """Return the working tree's changes against its commit; an empty string if there are none, or without git."""
    return _git(root, "diff", "HEAD") or ""


def _git(root: Path | str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
