"""The judge: trained once on real images, then it measures, and says what a good and a bad number are."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from ldm.config import build
from ldm.data.latents import batches
from ldm.io import atomic
from ldm.metrics.baseline import PCAGaussian, add_noise
from ldm.metrics.distribution import ClassAccuracy, FrechetDistance, MetricSuite, PrecisionRecall
from ldm.metrics.features import extract, to_uint8
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training.best import require_metric
from ldm.training.evaluator import LitEvaluator
from ldm.training.parallel import destroy_process_group


def train(
    cfg: Any,
    *,
    seed: int,
    steps: int,
    batch_size: int,
    net,
    optimizer,
    lr_schedule,
    label_smoothing: float,
    log_every: int,
    save_every: int,
) -> float:
    """Train the judge, standardise its features over the training set, keep them as the reference, measure the baselines."""
    folder = run_dir(cfg)
    if done := final_metrics(cfg, folder):
        return done["accuracy"]
    require_metric(cfg.get("keep_best"), (), "this training writes no number val/...")
    torch.manual_seed(derive_seed(seed, "weights"))
    net = net()
    with open_run(cfg, folder, cache.JUDGE) as run:
        data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
        build.require_labels(data, test)
        lit = LitEvaluator(net, optimizer, label_smoothing)
        callbacks = run.callbacks(
            "evaluator", steps=steps, lr_schedule=lr_schedule, log_every=log_every, save_every=save_every
        )
        instantiate(cfg.trainer)(lit, data, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=seed)
        destroy_process_group()
        if not run.is_main_process:
            return 0.0
        net.eval().to("cpu", torch.float32)
        with torch.no_grad():
            net.standardise(torch.cat([net.penultimate(to_uint8(image)) for image in batches(data)]))
        reference = extract(net, batches(data))
        atomic.write_tensors(folder / "weights.safetensors", net.state_dict())
        atomic.write_tensors(folder / "reference.safetensors", {"features": reference})
        metrics = baseline_scores(net, reference, data, test)
        run.finish(metrics)
        run.print(f"judge       accuracy {metrics['accuracy']:.3f} on the test images")
        return metrics["accuracy"]


def run_dir(cfg: Any) -> Path:
    """Where the judge that cfg trains is kept."""
    return cache.evaluator_dir(cfg)


def dependencies(cfg: Any) -> list[cache.CacheEntry]:
    """Nothing must be there before a judge."""
    return []


def evaluator_dependency(cfg: Any) -> list[cache.CacheEntry]:
    """The judge, where the config's metrics are measured by it."""
    return [cache.evaluator_entry(cfg)] if "_target_" in cfg.metrics and "net" not in cfg.metrics else []


def baseline_scores(net: Any, reference: Tensor, data, test, num: int = 5000) -> dict[str, float]:
    """Scores of what is no generative model worth the name: real test images, the same with noise, and a Gaussian per class."""
    num = min(num, len(test))
    rows = [(0, i) for i in range(num)]
    batch = test.batch(rows)
    train_images = data.batch([(0, i) for i in range(len(data))])
    rank = min(50, int(train_images["label"].bincount().min()) - 1)
    gaussian = PCAGaussian.fit(train_images["image"], train_images["label"], rank)
    noise = KeyedNoise(0, list(range(num)))
    wanted: dict[str, Any] = {"fd": FrechetDistance, "accuracy": ClassAccuracy, "precision_recall": PrecisionRecall}
    score = MetricSuite(net, reference, wanted)
    found: dict[str, float] = {}
    sets = {
        "test": batch["image"],
        "noisy": add_noise(batch["image"], 0.05, noise),
        "pca": gaussian.sample(batch["label"], noise),
    }
    for name, image in sets.items():
        score.reset()
        for part, label in zip(image.split(500), batch["label"].split(500), strict=True):
            score.update(part, label)
        values = score.compute()
        found |= {f"{name}/{metric}": value for metric, value in values.items() if metric != "n"}
    return {"accuracy": found["test/accuracy"], **found}
