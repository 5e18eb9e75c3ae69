"""Run folders: named by what determines them, so that the same command finds its own; config, journal, result and lock in each.

A run folder holds config.yaml (resolved; a command takes it again by --config-path), metrics.jsonl (the journal), steps, grids and, when it
is finished, metrics.json.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ldm import durable
from ldm.argv import escape, unescape
from ldm.config_tree import iter_nodes, map_leaves, map_strings
from ldm.errors import UserError
from ldm.parse import json_of, yaml_of
from ldm.validate import module_of

# what does not change the result, or is shown in the name
RUN_ONLY = (
    *("seed", "name", "runs", "trainer", "logger", "cache", "optimize", "published", "resume", "resume_with", "skips", "dry"),
    *("keep_last", "keep_every", "keep_best", "training.snapshot_every", "training.score.every", "training.score.every_num"),
)


def run_id(config: Mapping[str, Any], words: Sequence[str] = (), ignore: Collection[str] = RUN_ONLY) -> str:
    """`<words>-<hash8>-s<seed>`: the name of a run's folder.

    config: resolved plain data.  ignore: dotted keys that the hash leaves out.
    """
    parts = [str(word).replace("/", "_").replace(" ", "_") for word in words if word]
    return "-".join([*parts, fingerprint(without(config, ignore))[:8], f"s{config.get('seed', 0)}"])


def fingerprint(value: Any) -> str:
    """sha256 of plain data, in hex; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def without(config: Mapping[str, Any], keys: Collection[str], above: str = "") -> dict[str, Any]:
    """A config less some dotted keys."""
    return {
        key: without(value, keys, f"{above}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{above}{key}" not in keys
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> list[str]:
    """Each dotted key whose value differs, as `key: old -> new`."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{above}{key}.")
        elif a != b:
            found.append(f"{above}{key}: {a} -> {b}")
    return found


class Recipe(NamedTuple):
    """What determines something that is trained once and kept: key, of its config; source, of the code that its config names."""

    key: str
    source: str


def recipe(nodes: Mapping[str, Any], targets: Iterable[str] = ()) -> Recipe:
    """The recipe of a cache entry: 16 hex digits each.

    nodes: resolved plain data, all that determines the result.  targets: dotted names of code besides the nodes' own `_target_`s.
    """
    names = [node["_target_"] for _, node in iter_nodes(nodes) if isinstance(node["_target_"], str)]
    return Recipe(fingerprint(nodes)[:16], source_digest([*names, *targets])[:16])


def source_digest(targets: Iterable[str]) -> str:
    """sha256 over the source files behind dotted names and all that these import in turn, libraries left out.  Nothing is imported."""
    files: dict[str, str] = {}
    waiting = [target for target in targets if is_own(target.split(".")[0])]
    while waiting:
        file, _ = module_of(waiting.pop())
        if file is None or str(file) in files:
            continue
        files[str(file)], named = _read(file, file.stat().st_mtime_ns)
        waiting += [name for name in named if is_own(name.split(".")[0])]
    # by content: the place of the clone is not in it
    return hashlib.sha256("".join(sorted(files.values())).encode()).hexdigest()


@cache
def _read(file: Path, changed: int) -> tuple[str, list[str]]:
    """sha256 of a source file, last changed at that moment, and the dotted names that it imports."""
    source, named = file.read_bytes(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named += [one.name for one in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            named += [f"{node.module}.{one.name}" for one in node.names]
    return hashlib.sha256(source).hexdigest(), named


@cache
def is_own(package: str) -> bool:
    """Whether a top package is this one or a person's own, not an installed library or the standard one."""
    if package in sys.stdlib_module_names:
        return False
    spec = importlib.util.find_spec(package)
    if spec is None:
        return False
    place = spec.origin or next(iter(spec.submodule_search_locations or []), "")
    return bool(place) and not {"site-packages", "dist-packages"} & set(Path(place).parts)


def save_config(config: Mapping[str, Any], path: Path | str) -> None:
    """Write resolved plain data as yaml that Hydra and load_config read back to the same values."""
    from omegaconf import OmegaConf  # its yaml quotes text that its reader, unlike yaml's own, takes for a number: 1e-3

    durable.write_text(path, OmegaConf.to_yaml(OmegaConf.create(map_strings(dict(config), escape))))


def load_config(path: Path | str) -> dict[str, Any]:
    """The plain data of a saved config; nothing in it is resolved or called.  Raises UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not there: {path.parent} is not a run folder")
    try:
        config = yaml_of(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no config")
    return map_strings(config, unescape)


class Journal:
    """metrics.jsonl: a JSON object a line with step, wall (s since 1970) and the values, appended and flushed at once, never rewritten.

    resume: the step that a resumed run goes on from; rows of later steps, from before, no longer count.
    """

    def __init__(self, path: Path | str, resume: int | None = None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if torn:  # the last writer was killed within a line
            self.file.write("\n")
        if resume is not None:
            self._append({"resume": resume, "wall": time.time()})

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row; a number that is not finite becomes null."""
        self._append({"step": int(step), "wall": time.time(), **{key: _json(value) for key, value in values.items()}})

    def _append(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_journal(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a journal that count: those overtaken after a resume dropped, of two rows with the same step and keys the last."""
    rows: dict[tuple, dict[str, Any]] = {}
    if not Path(path).is_file():
        return []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json_of(line)
        except ValueError:  # torn by a kill
            continue
        if "resume" in row:
            rows = {key: one for key, one in rows.items() if one["step"] <= row["resume"]}
        elif "step" in row:
            key = (row["step"], *sorted(row))
            rows.pop(key, None)
            rows[key] = row
    return list(rows.values())


def finish(folder: Path | str, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json, the mark of a finished run."""
    durable.write_json(Path(folder) / "metrics.json", map_leaves(metrics, _json))


def finished(folder: Path | str) -> dict[str, Any] | None:
    """The final metrics of a finished run, None for one that is not."""
    file = Path(folder) / "metrics.json"
    return json_of(file.read_text()) if file.is_file() else None


def _json(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def lock(folder: Path | str) -> Iterator[None]:
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


def provenance(root: Path | str) -> dict[str, Any]:
    """What a result comes from: command line, git commit of the folder `root` and whether files differ from it, versions, machine."""
    packages = {}
    for name in ("torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "safetensors", "open-clip-torch", "numpy"):
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


def commit(root: Path | str) -> str:
    """The git commit of the folder `root`, 12 hex digits and a + where files differ from it; nothing where there is no git."""
    found = provenance(root)
    return f"{found['commit'][:12]}{'+' if found['changed'] else ''}" if found["commit"] else ""


def write_origin(folder: Path | str, root: Path | str) -> None:
    """Write where a run comes from: provenance.json, changes.diff against the commit of the folder `root`, every package's version."""
    folder = Path(folder)
    durable.write_json(folder / "provenance.json", provenance(root))
    durable.write_text(folder / "changes.diff", uncommitted(root))
    packages = {f"{one.metadata['Name']}=={one.version}" for one in importlib.metadata.distributions()}
    durable.write_text(folder / "environment.txt", "\n".join(sorted(packages, key=str.lower)) + "\n")


@contextmanager
def logged(path: Path | str) -> Iterator[None]:
    """Within it, what this process prints is appended to a file as well, lines redrawn on a terminal aside, and at last what ended it."""
    before = sys.stdout, sys.stderr
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}\n")
        sys.stdout, sys.stderr = (_Copied(stream, file) for stream in before)  # type: ignore[assignment]
        try:
            yield
        except BaseException as error:
            file.write("".join(traceback.format_exception(error)))
            raise
        finally:
            sys.stdout, sys.stderr = before


class _Copied:
    """A text stream whose whole lines are written to a file too."""

    def __init__(self, stream: Any, file: TextIO):
        self.stream, self.file = stream, file

    def write(self, text: str) -> int:
        if "\r" not in text and "\x1b" not in text and not self.file.closed:
            self.file.write(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def uncommitted(root: Path | str) -> str:
    """The difference of the working tree from its commit, empty where there is none or no git."""
    return _git(root, "diff", "HEAD") or ""


def _git(root: Path | str, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
