"""Parse JSON and YAML of unknown origin to plain data: nesting and size are bounded, and nothing in it is executed."""

import json
from typing import Any

MAX_DEPTH = 100  # levels of nested containers; this project's configs have up to 10


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.  Raises ValueError for anything else, including values nested too deeply."""
    try:
        return check_plain_data(json.loads(text))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML without aliases, which can expand a kilobyte to gigabytes; dates stay text.  Raises ValueError."""
    import yaml

    class Plain(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(
                    f"line {self.peek_event().start_mark.line + 1} repeats another part by an alias; write it out"
                )
            return super().compose_node(parent, index)

    Plain.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
    try:
        return check_plain_data(yaml.load(text, Plain))
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None


def check_plain_data(value: Any) -> Any:
    """Return the value.  Raises ValueError for types that JSON does not have and beyond MAX_DEPTH nested containers."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        for item in level:
            if not isinstance(item, dict | list | str | int | float | None):
                raise ValueError(f"holds {type(item).__name__}, expected text, numbers, lists and mappings")
            if isinstance(item, dict) and not all(isinstance(key, str) for key in item):
                raise ValueError(f"the key {next(key for key in item if not isinstance(key, str))!r:.60} is not text")
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
