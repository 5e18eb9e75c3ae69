"""The evaluator: a network trained on real images, whose features measure samples; and the scores of baselines."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from ldm.config import build
from ldm.data.latents import batches
from ldm.io import atomic
from ldm.io.images import to_uint8
from ldm.metrics.baseline import PCAGaussian, add_noise
from ldm.metrics.distribution import ClassAccuracy, FrechetDistance, MetricSuite, PrecisionRecall
from ldm.metrics.features import extract
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training.best import require_metric
from ldm.training.evaluator import LitEvaluator
from ldm.training.parallel import destroy_process_group


@dataclass(frozen=True, kw_only=True)
class EvaluatorRecipe:
    """The options of the training of the evaluator, the network whose features the metrics compare.

    net: builds the network.  optimizer: parameters -> optimizer.  lr_schedule: (step, total steps) -> factor on its
    rate.
    """

    seed: int
    steps: int
    batch_size: int
    net: Callable[..., Any]
    optimizer: Callable[..., Any]
    lr_schedule: Callable[..., float]
    label_smoothing: float
    log_every: int
    save_every: int

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder in the cache for the evaluator that cfg trains."""
        return cache.evaluator_dir(cfg)

    @staticmethod
    def dependencies(cfg: Any) -> list[cache.CacheEntry]:
        """Return nothing: an evaluator depends on the data alone."""
        return []

    def train(self, cfg: Any) -> float:
        """Train the evaluator and standardise its features over the training set; return the accuracy on test images.

        Writes weights.safetensors, and the features of the training set as reference.safetensors; measures the
        baselines.
        """
        folder = self.run_dir(cfg)
        if done := final_metrics(cfg, folder):
            return done["accuracy"]
        require_metric(cfg.get("keep_best"), (), "this training writes no number val/...", cfg.get("callbacks"))
        torch.manual_seed(derive_seed(self.seed, "weights"))
        net = self.net()
        with open_run(cfg, folder, cache.EVALUATOR) as run:
            data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
            build.require_labels(data, test)
            lit = LitEvaluator(net, self.optimizer, self.label_smoothing)
            callbacks = run.callbacks(
                "evaluator",
                steps=self.steps,
                lr_schedule=self.lr_schedule,
                log_every=self.log_every,
                save_every=self.save_every,
            )
            instantiate(cfg.trainer)(
                lit, data, callbacks, batch_size=self.batch_size, steps=self.steps, start=run.start, seed=self.seed
            )
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
            run.print(f"evaluator   accuracy {metrics['accuracy']:.3f} on the test images")
            return metrics["accuracy"]


def evaluator_dependency(cfg: Any) -> list[cache.CacheEntry]:
    """Return the evaluator, where the config's metrics measure with it."""
    return [cache.evaluator_entry(cfg)] if "_target_" in cfg.metrics and "net" not in cfg.metrics else []


def baseline_scores(net: Any, reference: Tensor, data, test, num: int = 5000) -> dict[str, float]:
    """Compute the scores of three baselines of up to `num` images.

    test: real test images.  noisy: the same with noise of standard deviation 0.05.  pca: samples of a Gaussian per
    class, fitted to the training images' leading principal components.
    """
    num = min(num, len(test))
    rows = [(0, i) for i in range(num)]
    batch = test.batch(rows)
    train_images = data.batch([(0, i) for i in range(len(data))])
    rank = min(50, int(train_images["label"].bincount().min()) - 1)
    gaussian = PCAGaussian.fit(train_images["image"], train_images["label"], rank)
    noise = KeyedNoise(0, list(range(num)))
    metrics: dict[str, Any] = {"fd": FrechetDistance, "accuracy": ClassAccuracy, "precision_recall": PrecisionRecall}
    score = MetricSuite(net, reference, metrics)
    scores: dict[str, float] = {}
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
        scores |= {f"{name}/{metric}": value for metric, value in values.items() if metric != "n"}
    return {"accuracy": scores["test/accuracy"], **scores}
