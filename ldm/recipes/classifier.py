"""A classifier of noisy latents for guidance=classifier, measured on test images at several noise levels."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ldm.config import build
from ldm.config.build import build_classifier
from ldm.data.latents import LatentDataset
from ldm.io import atomic
from ldm.recipes import checks
from ldm.recipes.autoencoder import first_stage_dependency, load_or_train_first_stage
from ldm.recipes.latents import cached_moments
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache
from ldm.runs.data_card import DataCard
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training.best import require_metric
from ldm.training.classifier import LitClassifier, noisy_logits

EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # times t in [0, 1] at which the accuracy is measured


@dataclass(frozen=True, kw_only=True)
class ClassifierRecipe:
    """The options of the training of a classifier of noisy latents.

    net: builds the network from in_channels=, classes= and size=.  optimizer: parameters -> optimizer.
    lr_schedule: (step, total steps) -> factor on its rate.  num: test images on which the accuracy is measured.
    """

    steps: int
    batch_size: int
    net: Callable[..., nn.Module]
    optimizer: Callable[..., Any]
    lr_schedule: Callable[..., float]
    log_every: int
    save_every: int
    num: int = 2000

    @staticmethod
    def run_dir(cfg: Any) -> Path:
        """Return the folder of the run."""
        return cache.run_dir(cfg, "classifier")

    @staticmethod
    def dependencies(cfg: Any) -> list[cache.CacheEntry]:
        """Return the first stage, whose latents the classifier reads."""
        return first_stage_dependency(cfg)

    def train(self, cfg: Any) -> float:
        """Train on cached latents with noise at the config's times; return the mean accuracy over EVAL_TIMES."""
        build.reject_degradation(cfg)
        folder = self.run_dir(cfg)
        if done := final_metrics(cfg, folder):
            print(f"this run is done: {folder}")
            return done["accuracy"]
        require_metric(cfg.get("keep_best"), (), "this training writes no number val/...", cfg.get("callbacks"))
        data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
        build.require_labels(data, test)
        checks.check_dimensions("training.net", cfg.training.net, data)
        autoencoder, space, _ = load_or_train_first_stage(cfg, data.shape[0])
        schedule = instantiate(cfg.schedule)
        with open_run(cfg, folder) as run:
            if run.resume is not None:
                remedy = "the first stage was replaced since this run began: give it another name="
                space.require_same(run.resume.metadata, run.checkpoints, remedy)
            torch.manual_seed(derive_seed(cfg.seed, "weights"))
            network = build_classifier(self.net, autoencoder, data)
            if run.is_main_process:
                DataCard.from_dataset(data).write(folder)
            times = instantiate(cfg.timestep_sampling)
            lit = LitClassifier(network, autoencoder, schedule, times, self.optimizer, cfg.seed)
            callbacks = run.callbacks(
                "classifier",
                steps=self.steps,
                lr_schedule=self.lr_schedule,
                metadata=space.metadata,
                log_every=self.log_every,
                save_every=self.save_every,
            )
            latents = LatentDataset(data, cached_moments(autoencoder, space, data))
            instantiate(cfg.trainer)(
                lit, latents, callbacks, batch_size=self.batch_size, steps=self.steps, start=run.start, seed=cfg.seed
            )
            if run.is_main_process:
                network.eval().to("cpu", torch.float32)
                atomic.write_tensors(folder / "weights.safetensors", network.state_dict(), space.metadata)
            metrics = evaluate_accuracy(network, autoencoder.cpu(), schedule, test, self.num)
            run.finish(metrics)
            run.print(f"classifier  {'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}\nin {folder}")
            return metrics["accuracy"]


@torch.no_grad()
def evaluate_accuracy(net: nn.Module, autoencoder: Any, schedule: Any, test: Any, num: int) -> dict[str, float]:
    """Compute the accuracy, in [0, 1], on up to `num` held-out images at each of EVAL_TIMES, and the mean of these."""
    right = dict.fromkeys(EVAL_TIMES, 0)
    num = min(num, len(test))
    for start in range(0, num, 500):
        rows = list(range(start, min(start + 500, num)))
        batch = test.batch([(0, i) for i in rows])
        z = autoencoder.encode(batch["image"])
        eps = KeyedNoise(0, rows).normal("eps", z)
        for t in EVAL_TIMES:
            logits = noisy_logits(net, schedule, z, torch.full((len(rows),), t), eps)
            right[t] += int((logits.argmax(1) == batch["label"]).sum())
    accuracies = {f"accuracy/t={t}": count / num for t, count in right.items()}
    return {"accuracy": sum(accuracies.values()) / len(accuracies), **accuracies}
