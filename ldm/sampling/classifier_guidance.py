"""Classifier guidance by a classifier trained on noisy latents (Dhariwal & Nichol 2021, sec. 4)."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.checkpoint.latent_space import LatentSpace, require_same_latent_space
from ldm.checkpoint.load import load_data_card, load_run_config
from ldm.condition import Condition
from ldm.config import build
from ldm.config.build import build_classifier
from ldm.diffusion import guidance as guidance_module
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.schedule import schedules_equal
from ldm.errors import UserError
from ldm.io import atomic
from ldm.runs.folder import find_run

CLASSIFIER_RECIPE = "ldm.recipes.classifier.ClassifierRecipe"  # by name: recipes import this package


def classifier_guidance(
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
        raise UserError(
            "guidance=classifier needs a classifier: guidance.classifier=RUN, made by train.py training=classifier"
        )
    if cond.label is None:
        raise UserError("guidance=classifier needs classes: label=NAME, or no prompt for all classes in turn")
    net, schedule = load_classifier(str(Path(classifier).expanduser().absolute()))
    if not schedules_equal(schedule, denoiser.schedule):
        raise UserError(f"guidance.classifier={classifier} was trained on another noise schedule than the model")
    label = cond.label

    def log_prob(x_t: Tensor, time: Tensor) -> Tensor:
        logits = net.to(x_t.device)(
            x_t, time.clone()
        ).float()  # a copy, as what was made in inference mode has no gradient
        return logits.log_softmax(1)[torch.arange(len(x_t)), label.to(x_t.device)]

    return guidance_module.classifier(denoiser, cond, uncond, log_prob, scale, interval)


def check_latent_space(run: str, space: str) -> None:
    """Raises UserError if the classifier of a run was trained in another latent space than the one of that name."""
    weights = weights_path(run)
    own = LatentSpace.from_metadata(atomic.read_metadata(weights), weights).name
    require_same_latent_space((f"guidance.classifier={run}", own), ("this model", space), "train one in its latents")


def weights_path(run: str) -> Path:
    """The weights file of a classifier's run. Raises UserError for a run of another kind, or one that has not ended."""
    folder = find_run(run)
    if load_run_config(folder).training._target_ != CLASSIFIER_RECIPE:
        raise UserError(
            f"guidance.classifier={run}: that run trained no classifier; expected one made by train.py training=classifier"
        )
    if not (folder / "weights.safetensors").is_file():
        raise UserError(f"guidance.classifier={run} has no weights yet: the same train.py command goes on with it")
    return folder / "weights.safetensors"


@lru_cache(maxsize=2)
def load_classifier(run: str) -> tuple[nn.Module, Any]:
    """The classifier of a run and its schedule. Raises UserError as `weights_path` does."""
    weights = weights_path(run)
    cfg, card = load_run_config(weights.parent), load_data_card(weights.parent)
    with torch.inference_mode(False):  # or its weights could not be differentiated through
        net = build_classifier(
            instantiate(cfg.training.net), build.build_autoencoder(cfg.autoencoder, card.channels), card
        )
        net.load_state_dict(atomic.read_tensors(weights))
    return net.eval().requires_grad_(False), instantiate(cfg.schedule)
