"""What a step costs as one thing grows: seconds and FLOPs beside each other, and the exponents of both."""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from pairs import HERE, seconds
from sampling import flops_of

from ldm.condition import Condition
from ldm.data.latents import LatentDataset
from ldm.data.memmap import create_memmap, open_memmap
from ldm.interop import diffusers_config
from ldm.report import rows

TABLE = HERE / "curves.csv"
ROUNDS = 5
Step = Callable[[], Any]


def net(channels: int = 64, context_dim: int = 512) -> torch.nn.Module:
    """The U-Net of built.UNETS["small"], `channels` wide."""
    from built import UNETS

    given = {**UNETS["small"], "in_channels": 4, "out_channels": 4, "sample_size": 16}
    node = diffusers_config.net({**given, "block_out_channels": tuple(factor * channels for factor in (1, 2, 4))})
    return instantiate(node, in_channels=4, out_channels=4, context_dim=context_dim)


def training(batch: int = 8, size: int = 16, channels: int = 64) -> Step:
    """A forward and backward pass and AdamW's step."""
    made = net(channels).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(made.parameters(), fused=True)
    x, t, cond = (
        torch.randn(batch, 4, size, size),
        torch.full((batch,), 500.0),
        Condition(context=torch.randn(batch, 77, 512)),
    )

    def step() -> None:
        made(x, t, cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling(steps: int) -> Step:
    """Guided DDIM on four images."""
    from built import told, unet
    from sampling import denoiser_of, guided, theirs_once

    from ldm.diffusion import grids, sampler

    made, given = unet("small", 16), told("small", 16, 4)
    denoiser = denoiser_of(made)
    grid = grids.trailing(denoiser.schedule, steps)
    once = flops_of(partial(theirs_once, made.theirs, given))  # packed layers are not counted

    def step() -> None:
        with torch.inference_mode():
            sampler.ddim(guided(denoiser, given), denoiser.schedule, given.x, grid, torch.randn_like)

    step.flops = steps * once
    return step


def reading(images: int, folder: Path, batch: int = 128) -> Step:
    """A batch of cached moments (16, 8, 8) at random out of so many on the disk."""
    path = folder / f"{images}.safetensors"
    with create_memmap(path, "moments", "F16", (1, images, 16, 8, 8), {}) as moments:
        moments.fill_(0.5)
    latents, generator = LatentDataset(Known(images), open_memmap(path, "moments")), torch.Generator().manual_seed(0)
    return lambda: latents.batch([(0, int(i)) for i in torch.randint(images, (batch,), generator=generator)])


class Known:
    """A data set of which nothing is asked but what is not in the latents."""

    flip = False

    def __init__(self, images: int):
        self.images = images

    def __len__(self) -> int:
        return self.images

    def batch_metadata(self, at: Sequence[tuple[int, int]]) -> dict[str, Any]:
        return {"index": [i for _, i in at], "flip": torch.zeros(len(at))}


def curves(most: int) -> dict[str, dict[int, Callable[[], Step]]]:
    """What grows -> its values up to `most` of a full run's -> what makes the step to time."""
    folder = Path(tempfile.mkdtemp(prefix="ldm-curves-"))
    return {
        "batch": {n: partial(training, batch=n) for n in (1, 2, 4, 8, 16, 32, 64)[:most]},
        "latent side": {n: partial(training, batch=4, size=n) for n in (16, 24, 32, 48, 64)[:most]},
        "channels": {n: partial(training, channels=n) for n in (32, 64, 96, 128, 192)[:most]},
        "sampling steps": {n: partial(sampling, n) for n in (5, 10, 20, 50)[:most]},
        "images on the disk": {n: partial(reading, n, folder) for n in (1_000, 10_000, 100_000, 1_000_000)[:most]},
    }


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x by least squares."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    return sum((u - mean_a) * (v - mean_b) for u, v in zip(a, b, strict=True)) / sum((u - mean_a) ** 2 for u in a)


def measure(threads: int, most: int = 99, table: Path = TABLE) -> None:
    """Every curve, a row of curves.csv a value, and the figure beside it."""
    found: list[dict[str, Any]] = []
    for what, values in curves(most).items():
        for value, make in values.items():
            step = make()
            step()
            taken = statistics.median(seconds(step, 1) for _ in range(ROUNDS))
            flops = getattr(step, "flops", None) or flops_of(step)
            found.append(
                {
                    "grows": what,
                    "value": value,
                    "ms": round(1e3 * taken, 3),
                    "gflop": round(flops / 1e9, 3),
                    "threads": threads,
                }
            )
            print(found[-1], flush=True)
        rows.write(table, found)
    draw(rows.read(table), table.with_suffix(".png"))


def draw(found: Sequence[dict[str, str]], path: Path) -> None:
    """A panel for each thing that grows: milliseconds, with the exponent of its larger half beside the FLOPs'."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    whats = list(dict.fromkeys(row["grows"] for row in found))
    figure, axes = plt.subplots(1, len(whats), figsize=(3 * len(whats), 2.8))
    for axis, what in zip(axes, whats, strict=True):
        xs, ms, gflop = (
            [float(row[name]) for row in found if row["grows"] == what] for name in ("value", "ms", "gflop")
        )
        half = len(xs) // 2
        said = f"time ^{exponent(xs[half:], ms[half:]):.2f}" if len(xs[half:]) > 1 else ""
        said += f", FLOPs ^{exponent(xs[half:], gflop[half:]):.2f}" if said and all(gflop) else ""
        axis.loglog(xs, ms, "o-")
        axis.set(xlabel=what, title=said, ylabel="ms" if axis is axes[0] else "")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
