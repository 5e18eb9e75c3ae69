"""Where a run comes from: git commit, local changes, packages, console output."""

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
from pathlib import Path
from typing import Any, TextIO

from ldm.io import atomic


def provenance(root: Path | str) -> dict[str, Any]:
    """What a result comes from: command line, git commit of the folder `root` and whether files differ from it, versions, machine."""
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
        "command": shlex.join(["python", *sys.orig_argv[1:]]),  # as typed: Hydra is given another sys.argv
        "commit": _git(root, "rev-parse", "HEAD"),
        "changed": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": packages,
    }


def git_commit(root: Path | str) -> str:
    """The git commit of the folder `root`, 12 hex digits and a + where files differ from it; nothing where there is no git."""
    found = provenance(root)
    return f"{found['commit'][:12]}{'+' if found['changed'] else ''}" if found["commit"] else ""


def write_provenance(folder: Path | str, root: Path | str) -> None:
    """Write where a run comes from: provenance.json, changes.diff against the commit of the folder `root`, every package's version."""
    folder = Path(folder)
    atomic.write_json(folder / "provenance.json", provenance(root))
    atomic.write_text(folder / "changes.diff", git_diff(root))
    packages = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    atomic.write_text(folder / "environment.txt", "\n".join(sorted(packages, key=str.lower)) + "\n")


@contextmanager
def tee_output(path: Path | str) -> Iterator[None]:
    """Within it, what this process prints is appended to a file as well, lines redrawn on a terminal aside, and at last what ended it."""
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
    """A text stream whose whole lines are written to a file too."""

    def __init__(self, stream: Any, file: TextIO):
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text and not self.file.closed:
            self.file.write(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def git_diff(root: Path | str) -> str:
    """The difference of the working tree from its commit, empty where there is none or no git."""
    return _git(root, "diff", "HEAD") or ""


def _git(root: Path | str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
