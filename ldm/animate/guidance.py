"""Figure of classifier-free guidance: the same seeds at several guidance scales."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.diffusion import grids
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import ddim
from ldm.sampling import tasks


def guidance(
    run: str,  # a run folder, or a folder of runs: the newest
    prompt: str | None = None,  # any text; without one, the data's own captions, a row each
    num: int = 5,  # rows, one seed each
    scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0),  # columns; 1 is no guidance
    steps: int = 20,  # of DDIM
    seed: int = 0,  # the first row's
) -> Animation:
    """Sample each seed (row) with each scale of classifier-free guidance (column) (Ho & Salimans 2022, fig. 3)."""
    arguments.require_at_least(1, num=num, steps=steps)
    model, batch = arguments.model_of(run), arguments.prompt_batch(run, prompt, num)
    ts = grids.default_grid(model.denoiser.schedule, steps)
    seeds = range(seed, seed + num)
    images = [tasks.sample(model, batch, seeds, ts, ddim, partial(cfg, scale=scale)) for scale in scales]
    return Animation(_figure(torch.stack(images).cpu(), scales, batch["caption"], seed), 1)


def _figure(images: Tensor, scales: Sequence[float], captions: list[str], seed: int) -> Iterator[Tensor]:
    high, wide = images.shape[-2:]
    zoom = max(1, 64 // wide)
    high, wide, gap, left = zoom * high, zoom * wide, 4, 190
    figure = plotting.canvas(left + len(scales) * (wide + gap) + 8, 30 + images.shape[1] * (high + gap) + 4)
    plotting.words(figure, "guidance scale", left - 10, 8, plotting.SOFT, 12, ha="right")
    for row in range(images.shape[1]):
        top = 26 + row * (high + gap)
        plotting.words(
            figure, plotting.cut(captions[row], 27), left - 10, top + high / 2 - 8, size=12, ha="right", va="center"
        )
        plotting.words(
            figure, f"seed {seed + row}", left - 10, top + high / 2 + 10, plotting.SOFT, 11, ha="right", va="center"
        )
        for column, scale in enumerate(scales):
            plotting.image(
                figure, images[column, row], left + column * (wide + gap), top, zoom, f"{scale:g}" if row == 0 else ""
            )
    yield plotting.frame(figure)
