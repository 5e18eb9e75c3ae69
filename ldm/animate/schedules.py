"""Figure of the forward process: one row of images per schedule."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.animate.forward import alpha_bar, process

COLOURS = (plotting.BLUE, plotting.RED, plotting.GREEN, plotting.YELLOW)


def schedules(
    image: str,  # an image file; its middle square is taken
    names: Sequence[str] = ("linear", "cosine"),  # one to four options of conf/schedule
    stages: int = 8,  # times from 0 to 1, one column each
    size: int = 64,  # pixels of the square
    crop: Sequence[float] | None = None,  # left,top,width,height of the part to show, in pixels
    seed: int = 0,  # of the noise, the same everywhere
) -> Animation:
    """Show an image at evenly spaced times under several schedules (Nichol & Dhariwal 2021, fig. 3, 5).

    The right panel shows their alpha bar.
    """
    arguments.require_at_least(2, stages=stages)
    arguments.require_at_least(8, size=size)
    return Animation(_figure(arguments.load_image(image, size, crop), names[: len(COLOURS)], stages, seed), 1)


def _figure(image: Tensor, names: Sequence[str], stages: int, seed: int) -> Iterator[Tensor]:
    ts, fine = (torch.linspace(0, 1, n, dtype=torch.float64) for n in (stages, 201))
    zoom = max(1, 64 // image.shape[-1])
    side, gap, left = zoom * image.shape[-1], 4, 20
    high = len(names) * (side + gap)
    across = stages * (side + gap)
    figure = plotting.canvas(left + across + 190, high + 46)
    axes = plotting.panel(figure, left + across + 40, 20, 140, high - gap, x="t", y="share of signal ᾱ")
    for row, name in enumerate(names):
        schedule = arguments.load_option("schedule", name, "names")
        for k, state in enumerate(process(image, schedule, ts, seed)):
            plotting.image(
                figure,
                state,
                left + k * (side + gap),
                20 + row * (side + gap),
                zoom,
                f"t = {ts[k]:.2g}" if row == 0 else "",
            )
        middle = 20 + row * (side + gap) + side / 2
        plotting.words(figure, name, left - 5, middle, COLOURS[row], 13, ha="right", va="center", rotation=90)
        axes.plot(fine, alpha_bar(schedule, fine), color=COLOURS[row], lw=1.6, label=name)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    plotting.legend(axes, loc="upper right")
    yield plotting.frame(figure)
