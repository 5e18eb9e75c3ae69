"""Evaluation of the images that a sampling request generated."""

from typing import TYPE_CHECKING, Any

from ldm.checkpoint.load import latent_space_of, load_run_config
from ldm.checkpoint.weights import parse_ema_length
from ldm.config.build import to_container
from ldm.evaluation import protocol
from ldm.sampling.request import SampleRequest

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.metrics.distribution import MetricSuite


def evaluate_samples(request: SampleRequest, images: "dict[int, Tensor]") -> dict[str, Any]:
    """The numbers of cfg.metrics over all processes, and of held-out images how near they were come to; empty for metrics=none."""
    from ldm.evaluation import evaluator

    make, _ = evaluator.make_scorer(load_run_config(request.folder), request.cfg.metrics)
    return {} if make is None else evaluate_with(request, images, make())


def evaluate_with(request: SampleRequest, images: "dict[int, Tensor]", scores: "MetricSuite") -> dict[str, Any]:
    """As score, by a Score that may have measured others before."""
    import torch
    from hydra.utils import instantiate

    scores.reset()
    pairs = instantiate(request.cfg.reconstruction_metrics)()
    rows = [seed - request.cfg.seed for seed in images]
    paired = request.held_out is not None and "image" not in request.inputs
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        batch = request.batch(part)
        image = torch.stack([images[request.cfg.seed + i] for i in part]).float() / 127.5 - 1
        scores.update(image, batch.get("label", torch.zeros(len(part), dtype=torch.long)), batch.get("caption"))
        if paired and batch["image"].shape == image.shape:
            pairs.update(batch["image"], image)
    near = pairs.compute() if paired else {}
    values = scores.compute()
    return {
        **values,
        **near,
        **protocol.with_protocol_hash({**scores.provenance, "n": values["n"], **sampling_protocol(request)}),
    }


def sampling_protocol(request: SampleRequest) -> dict[str, Any]:
    """What the protocol of a score says of its samples."""
    from ldm.devices import resolve_precision

    cfg = to_container(request.cfg)
    told = next(
        (f"{name}={cfg[name]}" for name in ("prompt", "prompts", "label") if cfg[name] is not None), cfg["labels"]
    )
    lengths = {"ema": load_run_config(request.folder).training.get("ema_sigma_rel"), "raw": None}
    sigma_rel = lengths[cfg["weights"]] if cfg["weights"] in lengths else parse_ema_length(cfg["weights"])
    scale, arithmetic = float(cfg["guidance"].get("scale", 1.0)), resolve_precision(str(cfg["precision"]))
    said = {"data": request.card.fingerprint, "labels": "held out" if request.held_out is not None else told}
    said |= {"autoencoder": latent_space_of(request.folder), "task": protocol.describe_node(cfg["task"])}
    said |= {} if cfg["tile"] is None else {"tile": cfg["tile"]}
    return said | protocol.sampling_settings(
        cfg, steps=cfg["steps"], scale=scale, sigma_rel=sigma_rel, arithmetic=arithmetic
    )
