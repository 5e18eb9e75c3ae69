"""Animation of images along an interpolation between two initial noises."""

from collections.abc import Iterator
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


def interpolate(
    run: str,  # a run folder, or a folder of runs: the newest
    prompt: str | None = None,  # any text; without one, the data's own captions
    num: int = 4,  # pairs of seeds: seed and seed + 1, seed + 2 and seed + 3, ...
    frames: int = 24,  # images on the way
    steps: int = 20,  # of DDIM
    scale: float = 3.0,  # of the guidance
    seed: int = 0,  # the first image's
) -> Animation:
    """Sample images along the great circle between two seeds' noises by DDIM (Song et al. 2021a, section 5.3)."""
    arguments.require_at_least(1, num=num, steps=steps)
    arguments.require_at_least(2, frames=frames)
    model, batch = arguments.model_of(run), arguments.prompt_batch(run, prompt, num)
    ts = grids.default_grid(model.denoiser.schedule, steps)
    sequences = []
    for row in range(num):
        row_batch = {
            name: [values[row]] * frames if isinstance(values, list) else values[row].expand(frames)
            for name, values in batch.items()
        }
        pair = partial(tasks.interpolate, seed_a=seed + 2 * row, seed_b=seed + 2 * row + 1, frames=frames)
        row_batch["index"] = list(range(frames))
        sequences.append(tasks.sample(model, row_batch, range(frames), ts, ddim, partial(cfg, scale=scale), pair))
    return Animation(_frames(torch.stack(sequences).cpu(), batch["caption"], seed), frames, seconds=0.12, colours=48)


def _frames(sequences: Tensor, captions: list[str], seed: int) -> Iterator[Tensor]:
    side = sequences.shape[-1]
    zoom = max(1, 96 // side)
    wide, gap = zoom * side, 10
    for k in range(sequences.shape[1]):
        figure = plotting.canvas(len(sequences) * (wide + gap) + gap, zoom * sequences.shape[-2] + 76)
        for row, images in enumerate(sequences):
            left = gap + row * (wide + gap)
            plotting.image(figure, images[k], left, 24, zoom, f"seed {seed + 2 * row} to {seed + 2 * row + 1}")
            plotting.words(
                figure,
                plotting.cut(captions[row], 19),
                left + wide / 2,
                zoom * sequences.shape[-2] + 28,
                plotting.SOFT,
                10,
                ha="center",
            )
        axes = plotting.panel(
            figure, gap + 2, zoom * sequences.shape[-2] + 56, len(sequences) * (wide + gap) - gap - 4, 1
        )
        axes.plot([0, 1], [0, 0], color=plotting.PALE, lw=2)
        axes.plot([k / (sequences.shape[1] - 1)], [0], "o", color=plotting.RED, ms=5, clip_on=False)
        plotting.hide_axes(axes).set(xlim=(0, 1))
        yield plotting.frame(figure)
