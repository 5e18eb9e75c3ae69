"""Run folders: named by what determines them, so that the same command finds its own; config, journal, result and lock in each.

A run folder holds config.yaml (resolved; a command takes it again by --config-path), metrics.jsonl (the journal), steps, grids and, when it
is finished, metrics.json.
"""

import ast
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config.tree import iter_nodes
from ldm.config.validate import find_module, is_user_code

# what does not change the result, or is shown in the name
NOT_HASHED = (
    *(
        "seed",
        "name",
        "runs",
        "trainer",
        "logger",
        "cache",
        "optimized_metric",
        "paper",
        "resume",
        "resume_allow_changes",
        "max_skipped_steps",
        "dry_run",
    ),
    *(
        "keep_last",
        "keep_every",
        "keep_best",
        "training.snapshot_every",
        "training.score.eval_every",
        "training.score.eval_num",
    ),
)


def run_id(config: Mapping[str, Any], words: Sequence[str] = (), ignore: Collection[str] = NOT_HASHED) -> str:
    """`<words>-<hash8>-s<seed>`: the name of a run's folder.

    config: resolved plain data.  ignore: dotted keys that the hash leaves out.
    """
    parts = [str(word).replace("/", "_").replace(" ", "_") for word in words if word]
    return "-".join([*parts, hash_config(drop_keys(config, ignore))[:8], f"s{config.get('seed', 0)}"])


def hash_config(value: Any) -> str:
    """sha256 of plain data, in hex; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def drop_keys(config: Mapping[str, Any], keys: Collection[str], above: str = "") -> dict[str, Any]:
    """A config less some dotted keys."""
    return {
        key: drop_keys(value, keys, f"{above}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{above}{key}" not in keys
    }


def config_diff(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> list[str]:
    """Each dotted key whose value differs, as `key: old -> new`."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += config_diff(a, b, f"{above}{key}.")
        elif a != b:
            found.append(f"{above}{key}: {a} -> {b}")
    return found


class CacheKey(NamedTuple):
    """What determines something that is trained once and kept: key, of its config; source, of the code that its config names."""

    key: str
    source: str


def cache_key(nodes: Mapping[str, Any], targets: Iterable[str] = ()) -> CacheKey:
    """The recipe of a cache entry: 16 hex digits each.

    nodes: resolved plain data, all that determines the result.  targets: dotted names of code besides the nodes' own `_target_`s.
    """
    names = [node["_target_"] for _, node in iter_nodes(nodes) if isinstance(node["_target_"], str)]
    return CacheKey(hash_config(nodes)[:16], hash_source([*names, *targets])[:16])


def hash_source(targets: Iterable[str]) -> str:
    """sha256 over the source files behind dotted names and all that these import in turn, libraries left out.  Nothing is imported."""
    files: dict[str, str] = {}
    waiting = [target for target in targets if is_user_code(target.split(".")[0])]
    while waiting:
        file, _ = find_module(waiting.pop())
        if file is None or str(file) in files:
            continue
        files[str(file)], named = _read(file, file.stat().st_mtime_ns)
        waiting += [name for name in named if is_user_code(name.split(".")[0])]
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
