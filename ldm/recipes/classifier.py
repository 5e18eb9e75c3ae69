"""The classifier of noisy latents: trained, measured on held-out images at several noise levels, and put to use as guidance."""

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from ldm.config import build
from ldm.config.build import build_classifier
from ldm.data.latents import LatentDataset
from ldm.io import atomic
from ldm.recipes.autoencoder import first_stage_dependency, load_or_train_first_stage
from ldm.recipes.latents import cached_moments
from ldm.recipes.resume import final_metrics
from ldm.recipes.run import open_run
from ldm.runs import cache
from ldm.runs.data_card import DataCard
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training.best import require_metric
from ldm.training.classifier import LitClassifier, noisy_logits

EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # times at which it is measured


def train(
    cfg: Any,
    *,
    steps: int,
    batch_size: int,
    net,
    optimizer,
    lr_schedule,
    log_every: int,
    save_every: int,
    num: int = 2000,
) -> float:
    """Train on cached latents with noise at the config's times; returns the mean accuracy on `num` held-out images over LEVELS."""
    build.reject_degradation(cfg)
    folder = run_dir(cfg)
    if done := final_metrics(cfg, folder):
        print(f"this run is done: {folder}")
        return done["accuracy"]
    require_metric(cfg.get("keep_best"), (), "this training writes no number val/...")
    data, test = build.build_dataset(cfg, "train"), build.build_dataset(cfg, "test")
    build.require_labels(data, test)
    autoencoder, space, _ = load_or_train_first_stage(cfg, data.channels)
    schedule = instantiate(cfg.schedule)
    with open_run(cfg, folder) as run:
        if run.resume is not None:
            space.require_same(
                run.resume.metadata,
                run.checkpoints,
                "the first stage was replaced since this run began: give it another name=",
            )
        torch.manual_seed(derive_seed(cfg.seed, "weights"))
        network = build_classifier(net, autoencoder, data)
        if run.is_main_process:
            DataCard.from_dataset(data).write(folder)
        lit = LitClassifier(network, autoencoder, schedule, instantiate(cfg.timestep_sampling), optimizer, cfg.seed)
        often: dict[str, Any] = {"log_every": log_every, "save_every": save_every}
        callbacks = run.callbacks("classifier", steps=steps, lr_schedule=lr_schedule, metadata=space.metadata, **often)
        latents = LatentDataset(data, cached_moments(autoencoder, space, data))
        instantiate(cfg.trainer)(
            lit, latents, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=cfg.seed
        )
        if run.is_main_process:
            network.eval().to("cpu", torch.float32)
            atomic.write_tensors(folder / "weights.safetensors", network.state_dict(), space.metadata)
        metrics = evaluate_accuracy(network, autoencoder.cpu(), schedule, test, num)
        run.finish(metrics)
        run.print(f"classifier  {'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}\nin {folder}")
        return metrics["accuracy"]


def run_dir(cfg: Any) -> Path:
    """The folder of the run."""
    return cache.run_dir(cfg, "classifier")


def dependencies(cfg: Any) -> list[cache.CacheEntry]:
    """What must be there before a classifier: the first stage whose latents it reads."""
    return first_stage_dependency(cfg)


@torch.no_grad()
def evaluate_accuracy(net: nn.Module, autoencoder: Any, schedule: Any, test: Any, num: int) -> dict[str, float]:
    """Part of held-out images whose class is found at each of LEVELS, and the mean of these."""
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
    found = {f"accuracy/t={t}": count / num for t, count in right.items()}
    return {"accuracy": sum(found.values()) / len(found), **found}
