"""The reverse process of a trained model."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm import task
from ldm.animate import chosen, plot
from ldm.animate.film import Film
from ldm.animate.watch import Seen, on_grid, under
from ldm.diffusion import times
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import Sampler
from ldm.model import LatentDiffusion


def reverse(
    run: str,  # a run folder, or a folder of runs: the newest
    prompt: str | None = None,  # any text; without one, the data's own captions
    num: int = 9,  # images
    steps: int = 30,  # of the sampler
    sampler: str = "ddim",  # an option of conf/sampler
    scale: float = 3.0,  # of the guidance
    seed: int = 0,  # the first image's; image i has seed + i
) -> Film:
    """Images as they are drawn: at each step the state x_t and the data that the model expects from it, both decoded."""
    chosen.at_least(1, num=num, steps=steps)
    model, batch, draw = chosen.model_of(run), chosen.told(run, prompt, num), chosen.option("sampler", sampler)
    ts = times.trailing(model.denoiser.schedule, steps)
    seen, last = drawn(model, batch, seed, ts, draw, scale)
    note = f"{sampler}, {steps} steps, guidance {scale:g}"
    return Film(_frames(model, seen, last, note, prompt), len(seen) + 1, seconds=0.12, colours=48)


@torch.inference_mode()
def drawn(model: LatentDiffusion, batch: dict[str, Any], seed: int, ts: Tensor, draw: Sampler, scale: float) -> tuple[list[Seen], Tensor]:
    """What the model was asked and answered at each time of the grid, in latents, and the images (B, C, H, W) of `task.draw`."""
    seen: list[Seen] = []
    seeds = range(seed, seed + len(batch["index"]))
    last = task.draw(model, batch, seeds, ts, draw, under(partial(cfg, scale=scale), seen))
    return on_grid(seen, ts), last


@torch.inference_mode()
def _frames(model: LatentDiffusion, seen: list[Seen], last: Tensor, note: str, prompt: str | None) -> Iterator[Tensor]:
    columns = plot.columns_of(len(last))
    for t, x_t, x0 in [*seen, Seen(torch.zeros(()), last, last)]:
        of = (x_t, x0) if x_t is last else (model.decode(x_t), model.decode(x0))
        left, right = (plot.sheet(images.cpu(), columns) for images in of)
        zoom = max(1, round(200 / left.shape[-1]))
        high, wide = (zoom * side for side in left.shape[-2:])
        figure = plot.canvas(2 * wide + 36, high + 66)
        plot.image(figure, left, 12, 24, zoom, f"state x_t, t = {float(t):.2f}")
        plot.image(figure, right, 24 + wide, 24, zoom, "expected data x0")
        plot.words(figure, note, 12, high + 30, plot.SOFT, 11)
        plot.words(figure, "" if prompt is None else f"“{plot.cut(prompt, 2 * wide // 7)}”", 12, high + 46, plot.INK, 11)
        yield plot.frame(figure)
