"""Which lines of ldm each test executes: traced in the process, and stored in .mutation/ between runs."""

import ast
import hashlib
import json
import os
import sys
import threading
import types
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutation import Project, first_line, functions

Lines = dict[str, list[int]]  # file::function -> lines, counted from the function's first


@dataclass
class Coverage:
    """What is known of a test file. digest: of its text.  tests: seconds and lines by test; failing ones have none.

    collected: the lines executed while it was imported.
    """

    digest: str
    tests: dict[str, tuple[float, Lines]] = field(default_factory=dict)
    collected: Lines = field(default_factory=dict)


class LineTracer:
    """Records the lines of files below a folder that are executed in this process."""

    def __init__(self, folder: Path):
        self.folder = f"{folder}{os.sep}"
        self.lines: dict[str, set[int]] = defaultdict(set)
        self.wanted: dict[str, bool] = {}

    def __call__(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        name = frame.f_code.co_filename
        wanted = self.wanted.get(name)
        if wanted is None:
            wanted = self.wanted[name] = name.startswith(self.folder)
        if not wanted:
            return None
        lines = self.lines[name]
        lines.add(frame.f_lineno)

        def local(frame: types.FrameType, event: str, arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return local

        return local

    def start(self) -> None:
        threading.settrace(self)  # type: ignore[arg-type]
        sys.settrace(self)

    def stop(self) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


class FunctionLines:
    """Turns lines of source files into lines of functions, which edits elsewhere in the file do not move."""

    def __init__(self, project: Project):
        self.project = project
        self.spans: dict[str, list[tuple[int, int, str]]] = {}

    def of(self, lines: dict[str, set[int]]) -> Lines:
        found: dict[str, set[int]] = defaultdict(set)
        for file, numbers in lines.items():
            for line in numbers:
                for first, last, name in self._spans(file):
                    if first <= line <= last:
                        found[name].add(line - first)
                        break
        return {name: sorted(numbers) for name, numbers in found.items()}

    def _spans(self, file: str) -> list[tuple[int, int, str]]:
        if file not in self.spans:
            name = self.project.name(Path(file))
            spans = [
                (first_line(node), node.end_lineno or 0, f"{name}::{function}")
                for function, node in functions(ast.parse(Path(file).read_text()))
            ]
            self.spans[file] = spans[::-1]  # inner functions before those around them
        return self.spans[file]


def read_coverage(project: Project) -> dict[str, Coverage]:
    file = project.cache / "coverage.json"
    if not file.exists():
        return {}
    return {name: Coverage(**entry) for name, entry in json.loads(file.read_text())["files"].items()}


def read_modules(project: Project) -> list[str]:
    """Return the modules that tests were found to import while they run."""
    file = project.cache / "coverage.json"
    return json.loads(file.read_text())["modules"] if file.exists() else []


def write_coverage(project: Project, coverage: dict[str, Coverage], modules: list[str]) -> None:
    project.cache.mkdir(exist_ok=True)
    file = project.cache / f"coverage.{os.getpid()}"
    file.write_text(json.dumps({"files": {k: vars(v) for k, v in coverage.items()}, "modules": modules}))
    file.replace(project.cache / "coverage.json")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
