"""Identify runs and cached models by hashes of what determines them, so that the same command finds its own folder.

A run folder contains config.yaml (resolved; a command reads it with --config-path), metrics.jsonl (metrics during
training), checkpoints, sample grids and, once it is finished, metrics.json.
"""

import ast
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ldm.config.signatures import find_module, imported_module, is_user_code, package_of
from ldm.config.tree import iter_nodes

# Keys that do not change the result, or that are part of the folder's name.
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
        "training.text_features",
        "training.validation",
        "training.health",
        "first_stage.health",
    ),
)

# Keys that older configs lack -> the values that mean what their runs did. With one of these a key counts as absent, so
# that the same command finds an older run.
FORMER_DEFAULTS: dict[str, tuple[Any, ...]] = {"callbacks": ({}, None), "training.latents": ("cached",)}


def run_id(config: Mapping[str, Any], words: Sequence[str] = (), ignore: Collection[str] = NOT_HASHED) -> str:
    """Return the name of a run folder, `<words>-<hash8>-s<seed>`.

    config: resolved plain data.  words: beginning of the name.  ignore: dotted keys that are not hashed.
    """
    parts = [str(word).replace("/", "_").replace(" ", "_") for word in words if word]
    return "-".join([*parts, hash_config(drop_keys(config, ignore))[:8], f"s{config.get('seed', 0)}"])


def hash_config(value: Any) -> str:
    """Return the SHA-256 of plain data in hex, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def drop_keys(config: Mapping[str, Any], keys: Collection[str], above: str = "") -> dict[str, Any]:
    """Return a config without the given dotted keys, and without those of FORMER_DEFAULTS that have a value there."""
    return {
        key: drop_keys(value, keys, f"{above}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{above}{key}" not in keys and value not in FORMER_DEFAULTS.get(f"{above}{key}", ())
    }


def config_diff(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> list[str]:
    """List the dotted keys whose values differ, as `key: old -> new`."""
    changes = []
    for key in sorted({*old, *new}):
        a, b = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changes += config_diff(a, b, f"{above}{key}.")
        elif a != b:
            changes.append(f"{above}{key}: {a} -> {b}")
    return changes


class CacheKey(NamedTuple):
    """What determines a model that is trained once and cached.

    key: hash of its config.  source: hash of the code that the config refers to.
    """

    key: str
    source: str


def cache_key(nodes: Mapping[str, Any], targets: Iterable[str] = ()) -> CacheKey:
    """Return the key of a cache entry; both hashes have 16 hex digits.

    nodes: resolved plain data, everything that determines the result.
    targets: dotted names of code in addition to the nodes' `_target_`s.
    """
    names = [node["_target_"] for _, node in iter_nodes(nodes) if isinstance(node["_target_"], str)]
    return CacheKey(hash_config(nodes)[:16], hash_source([*names, *targets])[:16])


def hash_source(targets: Iterable[str]) -> str:
    """Return the SHA-256 over the source files behind dotted names and their imports, recursively.

    Libraries are left out. Nothing is imported. The hash depends on content only, not on the path of the clone.
    """
    files: dict[str, str] = {}
    waiting = [target for target in targets if is_user_code(target.split(".")[0])]
    while waiting:
        target = waiting.pop()
        file, _ = find_module(target)
        if file is None or str(file) in files:
            continue
        files[str(file)], named = _read(file, file.stat().st_mtime_ns, package_of(target))
        waiting += [name for name in named if is_user_code(name.split(".")[0])]
    return hashlib.sha256("".join(sorted(files.values())).encode()).hexdigest()


@cache
def _read(file: Path, changed: int, package: str) -> tuple[str, list[str]]:
    """Return the SHA-256 of a source file and the names that it imports.

    changed: its mtime, part of the cache key.  package: the dotted name of its package.
    """
    source, named = file.read_bytes(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (module := imported_module(node, package)):
            named += [f"{module}.{alias.name}" for alias in node.names]
    return hashlib.sha256(source).hexdigest(), named
