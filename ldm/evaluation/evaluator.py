"""The evaluator: the feature network that scores samples, and its baselines."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from ldm.config import build
from ldm.data.latents import batches
from ldm.io import atomic
from ldm.metrics.distribution import MetricSuite
from ldm.metrics.features import extract
from ldm.runs import cache, metrics_log


def load_evaluator(cfg: Any, folder: Path) -> tuple[Any, Tensor]:
    """Load the evaluator in a folder, frozen, and its reference features (N, D)."""
    net = instantiate(cfg.evaluator.net)()
    net.load_state_dict(atomic.read_tensors(folder / "weights.safetensors"))
    return net.eval().requires_grad_(False), atomic.read_tensors(folder / "reference.safetensors")["features"]


def make_scorer(cfg: Any, metrics: Any) -> tuple[Callable[[], MetricSuite] | None, dict[str, Any]]:
    """Return a constructor of the MetricSuite of a `metrics` node, and the baselines of its network; (None, {}) for
    metrics=none.

    A node with a network of its own (Inception) takes its reference from the training set of cfg, which is computed
    now; other nodes use the evaluator of cfg's data, which is trained now unless it is cached.
    """
    if "_target_" not in metrics:
        return None, {}
    make = instantiate(metrics)
    if "net" in metrics:
        net = make.keywords["net"].eval()
        return partial(make, reference=extract(net, batches(build.build_dataset(cfg)))), {}
    folder = cache.ensure_evaluator(cfg)
    return partial(make, *load_evaluator(cfg, folder)), metrics_log.read_final_metrics(folder) or {}
