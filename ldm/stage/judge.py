"""The judge: trained once on real images, then it measures, and says what a good and a bad number are."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from ldm import build, durable, runs
from ldm.data.latents import batches
from ldm.metrics.baseline import PCAGaussian, noisy
from ldm.metrics.distribution import ClassAccuracy, FrechetDistance, PrecisionRecall, Score
from ldm.metrics.features import extract, to_uint8
from ldm.stage import cache
from ldm.stage.resume import finished
from ldm.stage.run import opened
from ldm.tensors import Noise, key
from ldm.training.best import require_metric
from ldm.training.judge import LitJudge
from ldm.training.parallel import disband


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
    folder = place(cfg)
    if done := finished(cfg, folder):
        return done["accuracy"]
    require_metric(cfg.get("keep_best"), (), "this training writes no number val/...")
    torch.manual_seed(key(seed, "weights"))
    net = net()
    with opened(cfg, folder, cache.JUDGE) as run:
        data, test = build.dataset(cfg, "train"), build.dataset(cfg, "test")
        build.labelled(data, test)
        lit = LitJudge(net, optimizer, label_smoothing)
        callbacks = run.callbacks("judge", steps=steps, lr_schedule=lr_schedule, log_every=log_every, save_every=save_every)
        instantiate(cfg.trainer)(lit, data, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=seed)
        disband()
        if not run.chief:
            return 0.0
        net.eval().to("cpu", torch.float32)
        with torch.no_grad():
            net.standardise(torch.cat([net.penultimate(to_uint8(image)) for image in batches(data)]))
        reference = extract(net, batches(data))
        durable.write_tensors(folder / "weights.safetensors", net.state_dict())
        durable.write_tensors(folder / "reference.safetensors", {"features": reference})
        metrics = baselines(net, reference, data, test)
        run.finish(metrics)
        run.say(f"judge       accuracy {metrics['accuracy']:.3f} on the test images")
        return metrics["accuracy"]


def place(cfg: Any) -> Path:
    """Where the judge that cfg trains is kept."""
    return cache.judge_folder(cfg)


def needs(cfg: Any) -> list[cache.Kept]:
    """Nothing must be there before a judge."""
    return []


def wanted(cfg: Any) -> list[cache.Kept]:
    """The judge, where the config's metrics are measured by it."""
    return [cache.kept_judge(cfg)] if "_target_" in cfg.metrics and "net" not in cfg.metrics else []


def load(cfg: Any, folder: Path) -> tuple[Any, Tensor]:
    """The judge kept in a folder and its reference features (N, D)."""
    net = instantiate(cfg.judge.net)()
    net.load_state_dict(durable.read_tensors(folder / "weights.safetensors"))
    return net.eval().requires_grad_(False), durable.read_tensors(folder / "reference.safetensors")["features"]


def scorer(cfg: Any, metrics: Any) -> tuple[Callable[[], Score] | None, dict[str, Any]]:
    """What makes a Score of a `metrics` node's numbers, and the baselines measured with the same network; (None, {}) for metrics=none.

    The node's own network if it has one (Inception), its reference taken from the training set now; else the judge, trained now if need be.
    """
    if "_target_" not in metrics:
        return None, {}
    make = instantiate(metrics)
    if "net" in metrics:
        net = make.keywords["net"].eval()
        return partial(make, reference=extract(net, batches(build.dataset(cfg)))), {}
    folder = cache.judge(cfg)
    return partial(make, *load(cfg, folder)), runs.finished(folder) or {}


def baselines(net: Any, reference: Tensor, data, test, num: int = 5000) -> dict[str, float]:
    """Scores of what is no generative model worth the name: real test images, the same with noise, and a Gaussian per class."""
    num = min(num, len(test))
    rows = [(0, i) for i in range(num)]
    batch = test.batch(rows)
    train_images = data.batch([(0, i) for i in range(len(data))])
    rank = min(50, int(train_images["label"].bincount().min()) - 1)
    gaussian = PCAGaussian.fit(train_images["image"], train_images["label"], rank)
    noise = Noise(0, list(range(num)))
    wanted: dict[str, Any] = {"fd": FrechetDistance, "accuracy": ClassAccuracy, "precision_recall": PrecisionRecall}
    score = Score(net, reference, wanted)
    found: dict[str, float] = {}
    sets = {"test": batch["image"], "noisy": noisy(batch["image"], 0.05, noise), "pca": gaussian.sample(batch["label"], noise)}
    for name, image in sets.items():
        score.reset()
        for part, label in zip(image.split(500), batch["label"].split(500), strict=True):
            score.update(part, label)
        values = score.compute()
        found |= {f"{name}/{metric}": value for metric, value in values.items() if metric != "n"}
    return {"accuracy": found["test/accuracy"], **found}
