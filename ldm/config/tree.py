"""Traverse resolved configs as plain data: nested mappings, lists and leaves, independent of OmegaConf."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) for everything in plain data, each container before its content.

    Paths: "", "a", "a.b", "a.b[0]".
    """
    yield path, value
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from walk(inner, f"{path}[{index}]")


def iter_nodes(value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the dotted path and the mapping of every node that has a `_target_`, outer nodes first."""
    return ((path, node) for path, node in walk(value) if isinstance(node, Mapping) and "_target_" in node)


def flatten(value: Any, above: str = "") -> dict[str, Any]:
    """Map the dotted path of every leaf to its value; a list and an empty mapping are leaves."""
    if isinstance(value, Mapping) and value:
        return {path: leaf for key, inner in value.items() for path, leaf in flatten(inner, f"{above}{key}.").items()}
    return {above.removesuffix("."): value}


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a copy of plain data with `change` applied to every leaf; tuples become lists."""
    if isinstance(value, Mapping):
        return {key: map_leaves(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [map_leaves(inner, change) for inner in value]
    return change(value)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of plain data with `change` applied to every string value; keys are left as they are."""
    return map_leaves(value, lambda leaf: change(leaf) if isinstance(leaf, str) else leaf)
