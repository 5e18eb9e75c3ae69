"""JSON and yaml of unknown origin as plain data: what nests or multiplies without end is one error, and nothing in it is called."""

import json
from typing import Any

MAX_DEPTH = 100  # of containers in one another: a config of ours reaches 10


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, also for one nested too deep."""
    try:
        return check_plain_data(json.loads(text))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None


def parse_yaml(text: str) -> Any:
    """The value of a yaml text without aliases, which can make gigabytes of a kilobyte; dates are text. Raises ValueError."""
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
    """The value itself. Raises ValueError for another kind than JSON's, and where containers nest deeper than DEEPEST."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        for one in level:
            if not isinstance(one, dict | list | str | int | float | None):
                raise ValueError(f"holds {type(one).__name__}, expected text, numbers, lists and mappings")
            if isinstance(one, dict) and not all(isinstance(key, str) for key in one):
                raise ValueError(f"the key {next(key for key in one if not isinstance(key, str))!r:.60} is not text")
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
