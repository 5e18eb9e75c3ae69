"""Estimate of the time that a training on a person's own images will take, from a few timed steps."""

import time
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate

from ldm.config import build
from ldm.data.latents import LatentDataset
from ldm.devices import rank_and_world_size
from ldm.io.progress import format_duration
from ldm.recipes.autoencoder import AutoencoderRecipe
from ldm.runs import cache, metrics_log
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.diffusion import LitDiffusion
from ldm.training.profiler import StepTimer

STEPS = 3  # timed steps of each kind; the fastest counts, because the first ones warm up


def print_estimate(cfg: Any, data) -> None:
    """Print how long the training will take, for a data set that describes itself.

    Prints nothing where several processes train: they cannot be timed before they are started.
    """
    if hasattr(data, "summary") and rank_and_world_size()[1] == 1 and cfg.trainer.devices == 1:
        print(format_estimate(*(part for part in time_stages(cfg, data) if part[1])), flush=True)


def format_estimate(*parts: tuple[str, int, float]) -> str:
    """Format the estimate; parts: (name, steps, seconds per step)."""
    total = sum(steps * seconds for _, steps, seconds in parts)
    each = ", ".join(f"{steps:,} steps of {name} at {1000 * seconds:.0f} ms" for name, steps, seconds in parts)
    return f"about {format_duration(total)} of training: {each} (timed now)"


def time_stages(cfg: Any, data) -> list[tuple[str, int, float]]:
    """Time steps with random weights of the first stage, unless it is in the cache, and of the diffusion model.

    Returns (name, steps, seconds per step) of each.  For a first stage that is not trained here, encoding the images is
    timed.
    """
    autoencoder = build.build_autoencoder(cfg.autoencoder, data.shape[0])
    parts = []
    config = {**build.to_container(cfg), "training": build.to_container(cfg.first_stage)}
    is_available = cfg.get("init") or not any(True for _ in autoencoder.parameters())
    first, second = instantiate(cfg.first_stage), instantiate(cfg.training)
    if not isinstance(first, AutoencoderRecipe):
        if second.latents == "cached":
            image = data.pixels([0])
            with torch.no_grad():
                seconds = [time_call(lambda: autoencoder.posterior(image)) for _ in range(STEPS)]
            parts.append(("encoding an image", len(data) * (2 if data.flip else 1), min(seconds)))
    elif not is_available and metrics_log.read_final_metrics(cache.first_stage_dir(config)) is None:
        without = min(first.discriminator_start, first.steps)
        seconds = time_steps(cfg, adversarial(autoencoder, first, data), data, first.batch_size, 2 * STEPS)
        parts.append(("the autoencoder", without, min(seconds[1:STEPS])))
        parts.append(("it with its adversary", first.steps - without, min(seconds[STEPS + 1 :])))
    if second.latents == "cached":
        with torch.no_grad():
            moments = autoencoder.eval().posterior(data.pixels([0]).to(autoencoder.shift)).moments.cpu()
        latents = LatentDataset(data, moments[None].expand(2 if data.flip else 1, len(data), *moments.shape[1:]))
    else:
        latents = data
    model = build.build_model(cfg, autoencoder, data)
    lit = LitDiffusion(model, instantiate(cfg.objective), second.optimizer, second.cond_drop_prob)
    seconds = time_steps(cfg, lit, latents, second.batch_size, STEPS)
    return [*parts, ("the diffusion model", second.steps, min(seconds[1:]))]


def adversarial(autoencoder, recipe: AutoencoderRecipe, data) -> LitAutoencoder:
    """Return the first stage's training step, its discriminator starting at step STEPS."""
    return LitAutoencoder(
        autoencoder,
        recipe.loss,
        recipe.optimizer,
        recipe.discriminator(channels=data.shape[0]),
        recipe.discriminator_optimizer,
        STEPS,
        recipe.discriminator_ramp,
        recipe.discriminator_weight,
    )


def time_call(function: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.monotonic()
    function()
    return time.monotonic() - start


def time_steps(cfg: Any, lit, data, batch_size: int, steps: int) -> list[float]:
    """Return the seconds of each of some training steps."""
    timer = StepTimer()
    instantiate(cfg.trainer)(lit, data, [timer], batch_size=batch_size, steps=steps, start=0, seed=0)
    return timer.seconds
