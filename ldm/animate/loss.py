"""Figure of the loss: the divergence of the reverse step from the forward process's posterior."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.animate.mixture import ring
from ldm.diffusion import grids
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.diffusion.variance import fixed_small, gaussian_nll, vlb_term
from ldm.tensors import KeyedNoise, mean_per_sample


class Terms(NamedTuple):
    """Errors at several times.

    ts: (N,).  kl: (N, B), each step's KL(q(x_s | x_t, x0) || p(x_s | x_t)) in bits per dimension.
    eps: (N, B), squared error of the noise.
    """

    ts: Tensor
    kl: Tensor
    eps: Tensor


def loss(
    run: str | None = None,  # a run folder, or a folder of runs: the newest; null: Gaussians and their exact score
    num: int = 32,  # held-out images, or points of the plane
    points: int = 40,  # steps that are evaluated
    seed: int = 0,  # of the noise
) -> Animation:
    """Plot the KL between forward and reverse posteriors at each step, and the error of the predicted noise.

    The bound on the likelihood is the sum of the left curve over all steps (Ho et al. 2020, eq. 5; Nichol & Dhariwal
    2021, fig. 2), the loss of most models the mean of the right one (Ho et al. 2020, eq. 14): the same errors with
    other weights.
    """
    arguments.require_at_least(1, num=num)
    arguments.require_at_least(2, points=points)
    noise = KeyedNoise(seed, list(range(num)))
    if run is None:
        data = ring(arguments.load_option("schedule", "cosine"))
        result = terms(data, data.schedule, data.sample(noise), points, noise)
        title = f"exact score of {len(data.means)} Gaussians"
    else:
        result, title = of_run(run, num, points, noise), f"trained model, {num} held-out images"
    return Animation(_figure(result, title), 1)


@torch.inference_mode()
def terms(denoise: Denoise, schedule: Schedule, x0: Tensor, points: int, noise: KeyedNoise) -> Terms:
    """Compute the Terms of data x0 (B, ...) at up to `points` entries of a table schedule, evenly spaced in log t.

    The first entry, with s = 0, has no KL and is left out.  Raises ConfigError for a schedule without a table.
    """
    T = grids.num_timesteps(schedule)
    indices = torch.logspace(0, 1, points, base=T / 2, dtype=torch.float64).mul(2).round().clamp(2, T).unique()
    rows = []
    for i in indices:
        t, s = i / T, (i - 1) / T
        eps = noise.normal(f"loss/{int(i)}", x0)
        x_t = add_noise(schedule, x0, eps, t)
        estimate = denoise(x_t, t)
        kl = vlb_term(schedule, x0, x_t, t, s, estimate, fixed_small, gaussian_nll)
        rows.append((kl.cpu(), mean_per_sample((estimate.eps - eps) ** 2).cpu()))
    return Terms(indices / T, *(torch.stack(part).double() for part in zip(*rows, strict=True)))


def of_run(run: str, num: int, points: int, noise: KeyedNoise) -> Terms:
    """Compute the Terms of a run's model on the held-out images of its data."""
    from ldm.runs.folder import find_run
    from ldm.sampling.request import load_held_out
    from ldm.sampling.tasks import encode_latents

    model = arguments.model_of(run)
    batch = load_held_out(find_run(run)).batch([(0, i) for i in range(num)])
    z = encode_latents(model, batch["image"])
    with torch.inference_mode():
        cond = model.condition({**batch, "noise": noise}).to(z).expand_concat(*z.shape[2:])
    return terms(lambda x_t, t: model.denoiser(x_t, t, cond), model.denoiser.schedule, z, points, noise)


def _figure(result: Terms, title: str) -> Iterator[Tensor]:
    figure = plotting.canvas(660, 288)
    panels = (
        (result.kl, "KL of one step, bits per dimension", plotting.BLUE),
        (result.eps, "squared error of the noise", plotting.RED),
    )
    for j, (values, name, colour) in enumerate(panels):
        axes = plotting.panel(figure, 66 + 330 * j, 30, 250, 190, name, x="t (log)")
        low, high = values.clamp(min=1e-12).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1)
        axes.fill_between(result.ts, low, high, color=colour, alpha=0.2, lw=0)
        axes.plot(result.ts, values.mean(1), color=colour, lw=1.6)
        axes.set(xscale="log")
        if j == 0:  # the rest of the KL at t = 1, where there is no signal, would take half of the axis
            axes.set(yscale="log", ylim=(1e-5 * float(high.max()), 2 * float(high.max())))
        axes.minorticks_off()
    plotting.words(figure, f"{title}; line: mean, band: 10 to 90%", 66, 268, plotting.SOFT, 11)
    yield plotting.frame(figure)
