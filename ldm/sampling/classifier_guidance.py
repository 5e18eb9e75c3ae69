"""Classifier guidance by a classifier trained on noisy latents (Dhariwal & Nichol 2021, sec. 4)."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.checkpoint.latent_space import LatentSpace, require_same_latent_space
from ldm.checkpoint.load import ModelSource, open_model
from ldm.condition import Condition
from ldm.config import build
from ldm.config.build import build_classifier
from ldm.diffusion import guidance as guidance_module
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.schedule import schedules_equal
from ldm.errors import UserError
from ldm.io import atomic

CLASSIFIER_RECIPE = "ldm.recipes.classifier.ClassifierRecipe"  # by name: recipes import this package


def classifier_guidance(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    classifier: str | None = None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Guide towards cond.label with the noisy-latent classifier that the run `classifier` trained; uncond is not used.

    scale: factor on the gradient of log p(label | x_t).  interval: of t in [0, 1], outside of which guidance is off.
    Raises UserError without a class or a classifier, and for a classifier of another noise schedule.
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
        # a copy of the time, because a tensor created in inference mode cannot take part in autograd
        logits = net.to(x_t.device)(x_t, time.clone()).float()
        return logits.log_softmax(1)[torch.arange(len(x_t)), label.to(x_t.device)]

    return guidance_module.classifier(denoiser, cond, uncond, log_prob, scale, interval)


def check_latent_space(run: str, space: str) -> None:
    """Check that the classifier of a run was trained in the latent space named `space`. Raises UserError otherwise."""
    path = weights_path(run, open_model(run))
    trained_in = LatentSpace.from_metadata(atomic.read_metadata(path), path).name
    require_same_latent_space(
        (f"guidance.classifier={run}", trained_in), ("this model", space), "train one in its latents"
    )


def weights_path(run: str, source: ModelSource) -> Path:
    """Return the weights file of a classifier's run.

    run, source: the run, as named by the user, and its source.
    Raises UserError for a run of another kind, or one that has not ended.
    """
    if source.config.get("training", {}).get("_target_") != CLASSIFIER_RECIPE:
        raise UserError(
            f"guidance.classifier={run}: that run trained no classifier; "
            "expected one made by train.py training=classifier"
        )
    path = source.folder / "weights.safetensors"
    if not path.is_file():
        raise UserError(f"guidance.classifier={run} has no weights yet: the same train.py command goes on with it")
    return path


@lru_cache(maxsize=2)
def load_classifier(run: str) -> tuple[nn.Module, Any]:
    """Load the classifier of a run, frozen, and its noise schedule. Raises UserError as `weights_path` does."""
    source = open_model(run)
    path, cfg, card = weights_path(run, source), source.config, source.data_card
    with torch.inference_mode(False):  # parameters created in inference mode could not be differentiated through
        autoencoder = build.build_autoencoder(cfg.autoencoder, card.shape[0])
        net = build_classifier(instantiate(cfg.training.net), autoencoder, card)
        net.load_state_dict(atomic.read_tensors(path))
    return net.eval().requires_grad_(False), instantiate(cfg.schedule)
