"""What the numbers of a `metrics` node are called, known before anything is built."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object

from ldm.metrics.distribution import MetricSuite


def metric_names(metrics: Mapping[str, Any], judge: Mapping[str, Any] | None) -> set[str] | None:
    """The keys that Score.compute() of a `metrics` node gives, without n; judge: the node of the network for those that name none.

    None where that cannot be known: a class of your own need not have `names` (a metric) or `name` (a network).
    """
    node = metrics.get("net") or judge
    if get_object(metrics["_target_"]) is not MetricSuite or node is None:
        return None
    network = getattr(get_object(node["_target_"]), "name", None)
    names: set[str] = set()
    for node in metrics["metrics"].values():
        name = network
        while "metric" in node:  # a metric of a part of the features
            name, node = node.get("name", name), node["metric"]
        patterns = getattr(get_object(node["_target_"]), "names", None)
        if patterns is None or not isinstance(name, str):
            return None
        names |= {pattern.format(net=name) for pattern in patterns}
    return names
