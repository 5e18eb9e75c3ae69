"""Animation of a density in the plane, transported from noise to data."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.animate.mixture import Mixture, ring
from ldm.animate.toy_net import score_of, train_toy_denoiser
from ldm.diffusion import grids, sampler
from ldm.diffusion.denoiser import Denoise
from ldm.sampling.monitor import states
from ldm.sampling.tasks import prior_sample
from ldm.tensors import KeyedNoise

EDGE = 2.6
FOLLOWED, TRAIL = 4, 8  # particles that are followed, and the length of the line behind each in states
LEVELS, GREYS = (0.05, 0.2, 0.4, 0.6, 0.8), ("#efefef", "#e2e2e2", "#d4d4d4", "#c6c6c6", "#b8b8b8")


def density(
    num: int = 300,  # particles
    steps: int = 40,  # of both samplers
    modes: int = 8,  # Gaussians of the data
    schedule: str = "cosine",  # an option of conf/schedule that is a table
    training: int = 1500,  # steps of a small network that learns the score from points of the data; 0: the exact score
    seed: int = 0,  # of the start, which both samplers share, of DDPM's noise, and of the training
) -> Animation:
    """Move particles from noise to a ring of Gaussians by DDPM and by DDIM, over the density and the score over time.

    They follow the learned score, and the exact one, in closed form, is shown under it. With training=0 they follow the
    exact score: the method alone, without a network's errors.
    """
    arguments.require_at_least(1, num=num, steps=steps, modes=modes)
    arguments.require_at_least(0, training=training)
    data = ring(arguments.load_option("schedule", schedule), modes)
    denoise: Denoise = train_toy_denoiser(data, training, seed) if training else data
    return Animation(
        _frames(data, denoise, grids.trailing(data.schedule, steps), num, seed), steps + 1, seconds=0.1, colours=48
    )


def trajectory(data: Mixture, denoise: Denoise, ts: Tensor, num: int, seed: int, draw: sampler.Sampler) -> Tensor:
    """Return the states (N + 1, num, 2) at each time of the grid; the initial noise depends only on the seed."""
    noise = KeyedNoise(seed, list(range(num)))
    start = prior_sample(data.schedule, ts[0], noise.normal("start", torch.empty(num, 2, dtype=torch.float64)))
    return states(lambda denoise: draw(denoise, data.schedule, start, ts, noise.sampler_noise("sampler")), denoise, ts)


def _frames(data: Mixture, denoise: Denoise, ts: Tensor, num: int, seed: int) -> Iterator[Tensor]:
    both: dict[str, sampler.Sampler] = {
        "DDPM: the score and new noise": sampler.ddpm,
        "DDIM: the score alone": partial(sampler.ddim, eta=0.0),
    }
    paths = {name: trajectory(data, denoise, ts, num, seed, draw) for name, draw in both.items()}
    line = torch.linspace(-EDGE, EDGE, 80, dtype=torch.float64)
    coarse = torch.linspace(-EDGE, EDGE, 15, dtype=torch.float64)[1:-1]
    fine, arrows = torch.cartesian_prod(line, line), torch.cartesian_prod(coarse, coarse)
    for k, t in enumerate(ts):
        figure = plotting.canvas(560, 312)
        shade = data.density(fine, t).reshape(80, 80).T
        exact = data.score(arrows, t)
        fields = (
            [(plotting.RED, exact), (plotting.INK, score_of(denoise, data, arrows, t))]
            if denoise is not data
            else [(plotting.SOFT, exact)]
        )
        for j, (name, x) in enumerate(paths.items()):
            axes = plotting.hide_axes(plotting.panel(figure, 12 + 274 * j, 24, 262, 262, name))
            axes.contourf(line, line, shade, [part * float(shade.max()) for part in LEVELS], colors=GREYS, extend="max")
            for colour, score in fields:
                axes.quiver(
                    *arrows.T, *_push(score).T, color=colour, angles="xy", scale_units="xy", scale=1, width=0.004
                )
            axes.scatter(*x[k].T, s=5, color=plotting.BLUE, lw=0, alpha=0.8)
            for i in range(min(FOLLOWED, num)):
                axes.plot(*x[max(k - TRAIL, 0) : k + 1, i].T, color=plotting.RED, lw=0.9)
                axes.plot(*x[k, i], "o", color=plotting.RED, ms=3.5)
            axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE))
        kind = "learned score (exact: red)" if denoise is not data else "exact score"
        about = f"t = {float(t):.2f}    shade: density    arrows: {kind}, length by log    lines: four"
        plotting.words(figure, about, 14, 292, plotting.INK, 11)
        yield plotting.frame(figure)


def _push(score: Tensor) -> Tensor:
    """Return arrows (B, 2) in the direction of the scores, with logarithmic length."""
    size = score.norm(dim=1, keepdim=True)
    return score / size.clamp(min=1e-9) * (torch.log1p(size) / 8).clamp(max=0.3)
