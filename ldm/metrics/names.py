"""The names of the numbers that a `metrics` node computes, known before anything is constructed."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object

from ldm.metrics.distribution import MetricSuite


def metric_names(metrics: Mapping[str, Any], evaluator: Mapping[str, Any] | None) -> set[str] | None:
    """Return the keys of MetricSuite.compute() for a `metrics` node, without n.

    evaluator: node of the evaluator's network, for a node that names none.
    Returns None if the keys are unknown: a user's class need not have `names` (a metric) or `name` (a network).
    """
    node = metrics.get("net") or evaluator
    if get_object(metrics["_target_"]) is not MetricSuite or node is None:
        return None
    network = getattr(get_object(node["_target_"]), "name", None)
    names: set[str] = set()
    for node in metrics["metrics"].values():
        name = network
        while "metric" in node:  # a metric on a slice of the features
            name, node = node.get("name", name), node["metric"]
        patterns = getattr(get_object(node["_target_"]), "names", None)
        if patterns is None or not isinstance(name, str):
            return None
        names |= {pattern.format(net=name) for pattern in patterns}
    return names
