"""What a training on one's own images will take, said before it starts and measured, not guessed."""

import time
from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import instantiate

from ldm.config import build
from ldm.data.latents import LatentDataset
from ldm.devices import rank_and_world_size
from ldm.io.progress import format_duration
from ldm.runs import cache, metrics_log
from ldm.training.autoencoder import LitAutoencoder
from ldm.training.diffusion import LitDiffusion
from ldm.training.profiler import StepTimer

STEPS = 3  # of each kind that are timed; the fastest counts, the first ones warm up


def print_estimate(cfg: Any, data) -> None:
    """Print how long the training will take, for data that said of itself what it is."""
    if (
        hasattr(data, "summary") and rank_and_world_size()[1] == 1 and cfg.trainer.devices == 1
    ):  # several cannot be timed before they are there
        print(format_estimate(*(part for part in time_stages(cfg, data) if part[1])), flush=True)


def format_estimate(*parts: tuple[str, int, float]) -> str:
    """The estimate in words; parts: what, steps, seconds a step."""
    total = sum(steps * seconds for _, steps, seconds in parts)
    each = ", ".join(f"{steps:,} steps of {name} at {1000 * seconds:.0f} ms" for name, steps, seconds in parts)
    return f"about {format_duration(total)} of training: {each} (timed now)"


def time_stages(cfg: Any, data) -> list[tuple[str, int, float]]:
    """(what, steps, seconds a step) of the first stage, unless it is kept already, and of the diffusion model, with fresh weights."""
    autoencoder = build.build_autoencoder(cfg.autoencoder, data.channels)
    parts = []
    config = {**build.to_container(cfg), "training": build.to_container(cfg.first_stage)}
    given = cfg.get("init") or not any(True for _ in autoencoder.parameters())
    first = instantiate(cfg.first_stage).keywords
    if "steps" not in first:  # others trained it; of a wide one to encode takes the time
        image = data.pixels([0])
        with torch.no_grad():
            seconds = [time_call(lambda: autoencoder.posterior(image)) for _ in range(STEPS)]
        parts.append(("encoding an image", len(data) * (2 if data.flip else 1), min(seconds)))
    elif not given and metrics_log.read_final_metrics(cache.first_stage_dir(config)) is None:
        without = min(first["discriminator_start"], first["steps"])
        seconds = time_steps(cfg, adversarial(autoencoder, first, data), data, first["batch_size"], 2 * STEPS)
        parts.append(("the autoencoder", without, min(seconds[1:STEPS])))
        parts.append(("it with its adversary", first["steps"] - without, min(seconds[STEPS + 1 :])))
    with torch.no_grad():
        moments = autoencoder.eval().posterior(data.pixels([0]).to(autoencoder.shift)).moments.cpu()
    every = moments[None].expand(2 if data.flip else 1, len(data), *moments.shape[1:])
    second = instantiate(cfg.training).keywords
    lit = LitDiffusion(
        build.build_model(cfg, autoencoder, data), instantiate(cfg.objective), second["optimizer"], second["cond_drop_prob"]
    )
    seconds = time_steps(cfg, lit, LatentDataset(data, every), second["batch_size"], STEPS)
    return [*parts, ("the diffusion model", second["steps"], min(seconds[1:]))]


def adversarial(autoencoder, options: dict[str, Any], data) -> LitAutoencoder:
    """The first stage's training, its adversary coming in at step STEPS."""
    names = ("discriminator_ramp", "discriminator_weight")
    discriminator = options["discriminator"](channels=data.channels)
    return LitAutoencoder(
        autoencoder,
        options["loss"],
        options["optimizer"],
        discriminator,
        options["discriminator_optimizer"],
        STEPS,
        *(options[name] for name in names),
    )


def time_call(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    start = time.monotonic()
    work()
    return time.monotonic() - start


def time_steps(cfg: Any, lit, data, batch_size: int, steps: int) -> list[float]:
    """Seconds of each of some training steps."""
    clock = StepTimer()
    instantiate(cfg.trainer)(lit, data, [clock], batch_size=batch_size, steps=steps, start=0, seed=0)
    return clock.seconds
