"""Animation of the reverse process of a trained model."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.diffusion import grids
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import Sampler
from ldm.model import LatentDiffusion
from ldm.sampling import tasks
from ldm.sampling.monitor import Evaluation, first_on_grid, recorded_guidance


def reverse(
    run: str,  # a run folder, or a folder of runs: the newest
    prompt: str | None = None,  # any text; without one, the data's own captions
    num: int = 9,  # images
    steps: int = 30,  # of the sampler
    sampler: str = "ddim",  # an option of conf/sampler
    scale: float = 3.0,  # of the guidance
    seed: int = 0,  # the first image's; image i has seed + i
) -> Animation:
    """Show sampling step by step: the state x_t and the model's prediction of x0, both decoded."""
    arguments.require_at_least(1, num=num, steps=steps)
    model, batch, draw = (
        arguments.model_of(run),
        arguments.prompt_batch(run, prompt, num),
        arguments.load_option("sampler", sampler),
    )
    ts = grids.default_grid(model.denoiser.schedule, steps)
    evaluations, last = sample_states(model, batch, seed, ts, draw, scale)
    note = f"{sampler}, {steps} steps, guidance {scale:g}"
    return Animation(_frames(model, evaluations, last, note, prompt), len(evaluations) + 1, seconds=0.12, colours=48)


@torch.inference_mode()
def sample_states(
    model: LatentDiffusion, batch: dict[str, Any], seed: int, ts: Tensor, draw: Sampler, scale: float
) -> tuple[list[Evaluation], Tensor]:
    """Record the model's inputs and outputs (latents) at each time of the grid; also return the images (B, C, H, W)."""
    evaluations: list[Evaluation] = []
    seeds = range(seed, seed + len(batch["index"]))
    last = tasks.sample(model, batch, seeds, ts, draw, recorded_guidance(partial(cfg, scale=scale), evaluations))
    return first_on_grid(evaluations, ts), last


@torch.inference_mode()
def _frames(
    model: LatentDiffusion, evaluations: list[Evaluation], last: Tensor, note: str, prompt: str | None
) -> Iterator[Tensor]:
    columns = plotting.columns_of(len(last))
    for t, x_t, x0 in [*evaluations, Evaluation(torch.zeros(()), last, last)]:
        pair = (x_t, x0) if x_t is last else (model.decode(x_t), model.decode(x0))
        left, right = (plotting.concatenate(images.cpu(), columns) for images in pair)
        zoom = max(1, round(200 / left.shape[-1]))
        high, wide = (zoom * side for side in left.shape[-2:])
        figure = plotting.canvas(2 * wide + 36, high + 66)
        plotting.image(figure, left, 12, 24, zoom, f"state x_t, t = {float(t):.2f}")
        plotting.image(figure, right, 24 + wide, 24, zoom, "expected data x0")
        plotting.words(figure, note, 12, high + 30, plotting.SOFT, 11)
        plotting.words(
            figure,
            "" if prompt is None else f"“{plotting.cut(prompt, 2 * wide // 7)}”",
            12,
            high + 46,
            plotting.INK,
            11,
        )
        yield plotting.frame(figure)
