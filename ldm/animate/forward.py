"""Animation of the forward process on an image under two schedules."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.errors import UserError
from ldm.tensors import KeyedNoise

COLOURS = (plotting.BLUE, plotting.RED)


def forward(
    image: str,  # an image file; its middle square is taken
    schedules: Sequence[str] = ("linear", "cosine"),  # two options of conf/schedule
    frames: int = 32,  # times from 0 to 1
    size: int = 64,  # pixels of the square
    crop: Sequence[float] | None = None,  # left,top,width,height of the part to show, in pixels
    seed: int = 0,  # of the noise, which is the same under both schedules
) -> Animation:
    """Show an image with growing noise under two schedules, and their alpha bar (Nichol & Dhariwal 2021, fig. 3, 5)."""
    arguments.require_at_least(2, frames=frames)
    arguments.require_at_least(8, size=size)
    if len(schedules) != 2:
        raise UserError(f"schedules={','.join(schedules)}: expected two names")
    return Animation(_frames(arguments.load_image(image, size, crop), schedules, frames, seed), frames, colours=48)


def process(image: Tensor, schedule: Schedule, ts: Tensor, seed: int = 0) -> Tensor:
    """Return alpha x0 + sigma eps, (N, C, H, W), for an image (C, H, W) at times (N,), with one eps for all times."""
    x0 = image[None]
    eps = KeyedNoise(seed, [0]).normal("forward", x0)
    return torch.cat([add_noise(schedule, x0, eps, t) for t in ts])


def alpha_bar(schedule: Schedule, ts: Tensor) -> Tensor:
    """Return the signal's share of the variance at times (N,): alpha^2 for a variance-preserving schedule."""
    return schedule.log_snr(ts).sigmoid()


def _frames(image: Tensor, names: Sequence[str], frames: int, seed: int) -> Iterator[Tensor]:
    ts = torch.linspace(0, 1, frames, dtype=torch.float64)
    fine = torch.linspace(0, 1, 201, dtype=torch.float64)
    both = [arguments.load_option("schedule", name, "schedules") for name in names]
    states = [process(image, schedule, ts, seed) for schedule in both]
    zoom = max(1, 128 // image.shape[-1])
    side = zoom * image.shape[-1]
    width, gap = max(2 * side + 36, 292), 12
    left = (width - 2 * side - gap) // 2
    for k, t in enumerate(ts):
        figure = plotting.canvas(width, side + 170)
        axes = plotting.panel(figure, 44, side + 44, width - 60, 84, x="t", y="ᾱ, share of signal")
        for j, (name, schedule) in enumerate(zip(names, both, strict=True)):
            share = float(alpha_bar(schedule, t))
            plotting.image(figure, states[j][k], left + j * (side + gap), 24, zoom).set_title(
                f"{name}  ᾱ = {share:.2f}", fontsize=13 * plotting.POINT, color=COLOURS[j], pad=4
            )
            axes.plot(fine, alpha_bar(schedule, fine), color=COLOURS[j], lw=1.4, label=name)
            axes.plot([float(t)], [share], "o", color=COLOURS[j], ms=5)
        axes.axvline(float(t), color=plotting.PALE, lw=0.8, zorder=0)
        axes.set(xlim=(0, 1), ylim=(-0.03, 1.05), xticks=[0, 0.5, 1], yticks=[0, 1])
        yield plotting.frame(figure)
