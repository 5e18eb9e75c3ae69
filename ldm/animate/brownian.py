"""Animation of Brownian motion: what the forward process does to one particle, and to many."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.diffusion.schedule import EDM
from ldm.diffusion.variance import forward_variance
from ldm.tensors import KeyedNoise


def brownian(
    num: int = 300,  # particles
    frames: int = 40,  # steps in time
    seed: int = 0,  # of the particles' noise
) -> Animation:
    """Move particles from one point in the plane and in space, follow one, compare their spread with the closed form.

    Each step adds independent noise. The path of a single particle is unpredictable, the spread of all is not:
    E|x|^2 = D t in D dimensions.
    """
    arguments.require_at_least(1, num=num)
    arguments.require_at_least(2, frames=frames)
    return Animation(_frames(num, frames, seed), frames + 1, colours=48)


def paths(num: int, steps: int, dim: int, seed: int = 0) -> Tensor:
    """Return paths (steps + 1, num, dim), float64, from time 0 to 1: x_t = x_s + noise of variance t - s.

    This is the forward process q(x_t | x_s) of the schedule with alpha = 1 and sigma^2 = time.
    """
    ts = torch.linspace(0, 1, steps + 1, dtype=torch.float64).sqrt()  # the schedule's sigma is its t
    draw = KeyedNoise(seed, list(range(num))).sampler_noise(f"brownian {dim}")
    x = torch.zeros(num, dim, dtype=torch.float64)
    out = [x]
    for s, t in pairwise(ts):
        x = x + forward_variance(EDM(1.0), t, s).sqrt() * draw(x)
        out.append(x)
    return torch.stack(out)


def spread(paths: Tensor) -> Tensor:
    """Return the mean of |x|^2 over the particles, (steps + 1,)."""
    return paths.square().sum(-1).mean(-1)


def _frames(num: int, frames: int, seed: int) -> Iterator[Tensor]:
    flat, deep = (paths(num, frames, dim, seed) for dim in (2, 3))
    time = torch.linspace(0, 1, frames + 1, dtype=torch.float64)
    for k in range(frames + 1):
        figure = plotting.canvas(640, 250)
        axes = plotting.hide_axes(plotting.panel(figure, 10, 26, 196, 196, "in the plane"))
        axes.scatter(*flat[k].T, s=4, color=plotting.BLUE, alpha=0.45, lw=0)
        axes.plot(*flat[: k + 1, 0].T, color=plotting.RED, lw=1)
        axes.plot(*flat[k, 0], "o", color=plotting.RED, ms=4)
        axes.add_patch(_circle(float(time[k]) ** 0.5))
        axes.set(xlim=(-3, 3), ylim=(-3, 3))
        space = plotting.panel(figure, 212, 26, 214, 196, projection="3d")
        plotting.words(figure, "in space", 319, 8, size=13, ha="center")
        space.scatter(*deep[k].T, s=4, color=plotting.BLUE, alpha=0.45, lw=0, depthshade=False)
        space.plot(*deep[: k + 1, 0].T, color=plotting.RED, lw=1)
        space.plot(*deep[k : k + 1, 0].T, "o", color=plotting.RED, ms=4)
        space.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), zlim=(-2.2, 2.2), xticks=[], yticks=[], zticks=[])
        for side in (space.xaxis, space.yaxis, space.zaxis):
            side.pane.set(fill=False, edgecolor=plotting.PALE)
            side.line.set_color(plotting.SOFT)
        space.set_box_aspect((1, 1, 1), zoom=1.2)
        space.view_init(22, 35 + 50 * k / frames)
        far = plotting.panel(figure, 482, 30, 146, 180, "mean of |x|²", x="time")
        for many, dim, colour in ((flat, 2, plotting.BLUE), (deep, 3, plotting.GREEN)):
            far.plot(time, dim * time, color=colour, lw=0.8, ls=":")
            far.plot(time[: k + 1], spread(many)[: k + 1], color=colour, lw=1.6)
            far.text(1.0, dim * 1.0, f"{dim} t ", color=colour, fontsize=11 * plotting.POINT, ha="right", va="bottom")
        far.set(xlim=(0, 1.02), ylim=(0, 3.6), xticks=[0, 1], yticks=[0, 1, 2, 3])
        plotting.words(figure, "red: one particle", 14, 228, plotting.RED, 11)
        plotting.words(figure, "circle: one standard deviation", 150, 228, plotting.SOFT, 11)
        yield plotting.frame(figure)


def _circle(radius: float):
    from matplotlib.patches import Circle

    return Circle((0, 0), radius, fill=False, color=plotting.INK, lw=0.8, ls="--")
