"""Evaluation of the images that a sampling request generated."""

from typing import TYPE_CHECKING, Any

from ldm.evaluation import protocol
from ldm.sampling.request import SampleRequest

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.metrics.distribution import MetricSuite

BATCH = 500  # images at a time


def evaluate_samples(request: SampleRequest, images: "dict[int, Tensor]") -> dict[str, Any]:
    """Measure the request's metrics over all processes and, for held-out images, their reconstruction; {} for
    metrics=none.

    images: this process's images, seed -> (C, H, W) uint8, or other samples (C, ...) float32.
    """
    from ldm.evaluation import evaluator

    make, _ = evaluator.make_scorer(request.source.config, request.metrics)
    return {} if make is None else evaluate_with(request, images, make())


def evaluate_with(request: SampleRequest, images: "dict[int, Tensor]", metrics: "MetricSuite") -> dict[str, Any]:
    """Measure as `evaluate_samples` does, with metrics that may have measured other images before."""
    import torch
    from hydra.utils import instantiate

    from ldm.io.images import to_float

    metrics.reset()
    pairs = instantiate(request.reconstruction_metrics)()
    rows = [seed - request.seed for seed in images]
    paired = request.held_out is not None and "image" not in request.inputs
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        batch = request.batch(part)
        image = to_float(torch.stack([images[request.seed + i] for i in part]))
        metrics.update(image, batch.get("label", torch.zeros(len(part), dtype=torch.long)), batch.get("caption"))
        if paired and batch["image"].shape == image.shape:
            pairs.update(batch["image"], image)
    reconstruction = pairs.compute() if paired else {}
    values = metrics.compute()
    settings = {**metrics.provenance, "n": values["n"], **sampling_protocol(request)}
    return {**values, **reconstruction, **protocol.with_protocol_hash(settings)}


def sampling_protocol(request: SampleRequest) -> dict[str, Any]:
    """Describe how the images of `request` were sampled, for the protocol stored with their scores.

    Includes data set, labels, task, sampler, steps, guidance, EMA length and arithmetic precision. Two scores are
    comparable only if these entries are equal (see `protocol_differences`).
    """
    from ldm.devices import resolve_precision

    options = request.options
    settings: dict[str, Any] = {
        "data": request.source.data_card.fingerprint,
        "labels": _conditions(request),
        "autoencoder": request.source.latent_space,
        "task": protocol.describe_node(options["task"]),
    }
    if request.tile is not None:
        settings["tile"] = request.tile
    settings |= {name: list(size) for name, size in request.sizes.items()}
    return settings | protocol.sampling_settings(
        options,
        steps=request.steps,
        scale=float(options["guidance"].get("scale", 1.0)),
        weights=protocol.describe_weights(request.weights, request.source.config.training),
        arithmetic=resolve_precision(request.precision),
    )


def _conditions(request: SampleRequest) -> str:
    """Describe what the images are conditioned on: held-out data, the option that was given, or how classes are
    assigned.
    """
    if request.held_out is not None:
        return "held out"
    given = (name for name in ("prompt", "prompts", "label") if request.options[name] is not None)
    return next((f"{name}={request.options[name]}" for name in given), request.options["labels"])
