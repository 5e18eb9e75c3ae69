"""The classifier of noisy latents: trained, measured on held-out images at several noise levels, and put to use as guidance."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm import build, durable
from ldm.condition import Condition
from ldm.data.latents import Latents
from ldm.diffusion import guidance as guiding
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.schedule import alike
from ldm.errors import UserError
from ldm.load import DataCard, config_of, load_data_card, run_folder
from ldm.space import Space, require_same_latent_space
from ldm.stage import autoencoder as first_stage
from ldm.stage import cache
from ldm.stage.diffusion import moments
from ldm.stage.resume import finished
from ldm.stage.run import opened
from ldm.tensors import Noise, key
from ldm.training.best import require_metric
from ldm.training.classifier import LitClassifier, noisy_logits

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # times at which it is measured


def train(cfg: Any, *, steps: int, batch_size: int, net, optimizer, lr_schedule, log_every: int, save_every: int, num: int = 2000) -> float:
    """Train on cached latents with noise at the config's times; returns the mean accuracy on `num` held-out images over LEVELS."""
    build.undegraded(cfg)
    folder = place(cfg)
    if done := finished(cfg, folder):
        print(f"this run is done: {folder}")
        return done["accuracy"]
    require_metric(cfg.get("keep_best"), (), "this training writes no number val/...")
    data, test = build.dataset(cfg, "train"), build.dataset(cfg, "test")
    build.labelled(data, test)
    autoencoder, space, _ = first_stage.load(cfg, data.channels)
    schedule = instantiate(cfg.schedule)
    with opened(cfg, folder) as run:
        if run.resume is not None:
            space.admit(run.resume.metadata, run.checkpoints, "the first stage was replaced since this run began: give it another name=")
        torch.manual_seed(key(cfg.seed, "weights"))
        network = make(net, autoencoder, data)
        if run.chief:
            DataCard.of(data).write(folder)
        lit = LitClassifier(network, autoencoder, schedule, instantiate(cfg.times), optimizer, cfg.seed)
        often: dict[str, Any] = {"log_every": log_every, "save_every": save_every}
        callbacks = run.callbacks("classifier", steps=steps, lr_schedule=lr_schedule, metadata=space.metadata, **often)
        latents = Latents(data, moments(autoencoder, space, data))
        instantiate(cfg.trainer)(lit, latents, callbacks, batch_size=batch_size, steps=steps, start=run.start, seed=cfg.seed)
        if run.chief:
            network.eval().to("cpu", torch.float32)
            durable.write_tensors(folder / "weights.safetensors", network.state_dict(), space.metadata)
        metrics = accuracies(network, autoencoder.cpu(), schedule, test, num)
        run.finish(metrics)
        run.say(f"classifier  {'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}\nin {folder}")
        return metrics["accuracy"]


def place(cfg: Any) -> Path:
    """The folder of the run."""
    return cache.run_folder(cfg, "classifier")


def needs(cfg: Any) -> list[cache.Kept]:
    """What must be there before a classifier: the first stage whose latents it reads."""
    return first_stage.wanted(cfg)


def make(net: Any, autoencoder: Any, data: Any) -> Any:
    """The network for a first stage's latents of a data set; net: its constructor, options bound."""
    return net(in_channels=autoencoder.z_channels, classes=len(data.classes), size=data.size // autoencoder.factor)


@torch.no_grad()
def accuracies(net: nn.Module, autoencoder: Any, schedule: Any, test: Any, num: int) -> dict[str, float]:
    """Part of held-out images whose class is found at each of LEVELS, and the mean of these."""
    right = dict.fromkeys(LEVELS, 0)
    num = min(num, len(test))
    for start in range(0, num, 500):
        rows = list(range(start, min(start + 500, num)))
        batch = test.batch([(0, i) for i in rows])
        z = autoencoder.encode(batch["image"])
        eps = Noise(0, rows).normal("eps", z)
        for t in LEVELS:
            logits = noisy_logits(net, schedule, z, torch.full((len(rows),), t), eps)
            right[t] += int((logits.argmax(1) == batch["label"]).sum())
    found = {f"accuracy/t={t}": count / num for t, count in right.items()}
    return {"accuracy": sum(found.values()) / len(found), **found}


def guidance(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    classifier: str | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Classifier guidance towards cond.label by the network that the run `classifier` trained; uncond is not used.

    Raises UserError without a class or a classifier, and for one of another schedule.
    """
    if classifier is None:
        raise UserError("guidance=classifier needs a classifier: guidance.classifier=RUN, made by train.py training=classifier")
    if cond.label is None:
        raise UserError("guidance=classifier needs classes: label=NAME, or no prompt for all classes in turn")
    net, schedule = load(str(Path(classifier).expanduser().absolute()))
    if not alike(schedule, denoiser.schedule):
        raise UserError(f"guidance.classifier={classifier} was trained on another noise schedule than the model")
    label = cond.label

    def log_prob(x_t: Tensor, time: Tensor) -> Tensor:
        logits = net.to(x_t.device)(x_t, time.clone()).float()  # a copy, as what was made in inference mode has no gradient
        return logits.log_softmax(1)[torch.arange(len(x_t)), label.to(x_t.device)]

    return guiding.classifier(denoiser, cond, uncond, log_prob, scale, interval)


def admit(run: str, space: str) -> None:
    """Raises UserError if the classifier of a run was trained in another latent space than the one of that name."""
    weights = finished_weights(run)
    own = Space.carried(durable.read_metadata(weights), weights).name
    require_same_latent_space((f"guidance.classifier={run}", own), ("this model", space), "train one in its latents")


def finished_weights(run: str) -> Path:
    """The weights file of a classifier's run. Raises UserError for a run of another kind, or one that has not ended."""
    folder = run_folder(run)
    if config_of(folder).training._target_ != f"{__name__}.train":
        raise UserError(f"guidance.classifier={run}: that run trained no classifier; expected one made by train.py training=classifier")
    if not (folder / "weights.safetensors").is_file():
        raise UserError(f"guidance.classifier={run} has no weights yet: the same train.py command goes on with it")
    return folder / "weights.safetensors"


@lru_cache(maxsize=2)
def load(run: str) -> tuple[nn.Module, Any]:
    """The classifier of a run and its schedule. Raises UserError as `finished_weights` does."""
    weights = finished_weights(run)
    cfg, card = config_of(weights.parent), load_data_card(weights.parent)
    with torch.inference_mode(False):  # or its weights could not be differentiated through
        net = make(instantiate(cfg.training.net), build.autoencoder(cfg.autoencoder, card.channels), card)
        net.load_state_dict(durable.read_tensors(weights))
    return net.eval().requires_grad_(False), instantiate(cfg.schedule)
