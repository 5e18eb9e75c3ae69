import json

import pytest

from ldm.config.tree import flatten, iter_nodes, map_leaves, map_strings, walk

CONFIG = {
    "a": {"_target_": "x.f", "list": [1, {"_target_": "x.g", "deep": "two"}]},
    "empty": {},
    "b": None,
    "c": (1, "one"),
}


def test_walk_visits_containers_first():
    found = dict(walk(CONFIG))
    assert list(found)[:6] == ["", "a", "a._target_", "a.list", "a.list[0]", "a.list[1]"]
    assert found["a.list[1].deep"] == "two"
    assert found["c[1]"] == "one"
    assert found["empty"] == {}
    assert len(found) == 13


def test_iter_nodes_yields_nodes_with_target():
    assert [(path, node["_target_"]) for path, node in iter_nodes(CONFIG)] == [("a", "x.f"), ("a.list[1]", "x.g")]


def test_flatten_preserves_lists():
    flat = flatten(CONFIG)
    assert list(flat) == ["a._target_", "a.list", "empty", "b", "c"]
    assert flat["a.list"] is CONFIG["a"]["list"]
    assert flat["empty"] == {}


@pytest.mark.parametrize("value", [CONFIG, [], "x", 3])
def test_map_strings_changes_only_strings(value):
    assert map_strings(value, lambda text: text) == json.loads(json.dumps(value))


def test_map_leaves_and_map_strings_reach_every_leaf():
    assert map_strings(CONFIG, str.upper)["a"]["list"] == [1, {"_target_": "X.G", "deep": "TWO"}]
    assert map_strings(CONFIG, str.upper)["c"] == [1, "ONE"]
    assert map_leaves({"a": [1, (2, {"b": 3})]}, lambda leaf: -leaf) == {"a": [-1, [-2, {"b": -3}]]}
