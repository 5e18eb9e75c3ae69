"""Measure a model's errors as a function of log-SNR on held-out images: training loss, errors of x0 and of eps."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.diffusion.schedule import add_noise
from ldm.report import rows
from ldm.tensors import KeyedNoise, mean_per_sample

if TYPE_CHECKING:
    from ldm.condition import Condition
    from ldm.diffusion.denoiser import Denoise
    from ldm.diffusion.schedule import Schedule

Terms = Callable[[Tensor, Tensor], dict[str, Tensor]]  # (t (B,), eps) -> the objective's terms (B,), including `loss`


@torch.inference_mode()
def errors_by_snr(
    denoise: "Denoise", schedule: "Schedule", x0: Tensor, noise: KeyedNoise, bins: int, terms: Terms | None = None
) -> list[dict[str, float]]:
    """Return one row of means per bin of log_snr, in order of decreasing signal.

    x0: clean samples (B, ...); each gets one time per bin, drawn within it, and the same eps in all bins. Times are
        rounded
    to the grid of a schedule that has one.  bins: number of bins of equal width in log_snr.  terms: adds `loss`.
    """
    ends = schedule.log_snr(torch.tensor([0.001, 0.999], dtype=torch.float64))
    edges, eps = (
        torch.linspace(float(ends[0]), float(ends[1]), bins + 1, dtype=torch.float64),
        noise.normal("levels", x0),
    )
    errors = []
    for i, (high, low) in enumerate(pairwise(edges)):
        u = noise.uniform(f"levels/{i}", x0.new_empty(len(x0))).double().cpu()
        t = schedule.t_from_log_snr(high + u * (low - high))
        if T := getattr(schedule, "T", None):
            t = (t * T).round().clamp(1, T) / T
        t = t.to(x0)
        estimate = denoise(add_noise(schedule, x0, eps, t), t)
        row = {"log_snr_high": float(high), "log_snr_low": float(low), "t": float(t.mean())}
        row |= {"x0_error": float(mean_per_sample((estimate.x0 - x0) ** 2).mean())}
        row |= {"eps_error": float(mean_per_sample((estimate.eps - eps) ** 2).mean())}
        errors.append(row | ({"loss": float(terms(t, eps)["loss"].mean())} if terms else {}))
    return errors


def of_run(run: str, num: int, bins: int) -> list[dict[str, float]]:
    """Compute the rows for a run's EMA weights on the first `num` held-out images of its data.  Raises UserError."""
    from hydra.utils import instantiate

    from ldm.checkpoint.load import load_model, load_run_config
    from ldm.runs.folder import find_run
    from ldm.sampling.request import load_held_out
    from ldm.sampling.tasks import encode_latents

    folder = find_run(run)
    data, model, objective = load_held_out(folder), load_model(run), instantiate(load_run_config(folder).objective)
    noise = KeyedNoise(0, list(range(min(num, len(data)))))
    batch = data.batch([(0, i) for i in range(len(noise))])
    z = encode_latents(model, batch["image"])
    with torch.inference_mode():
        cond: Condition = model.condition({**batch, "noise": noise}).to(z).expand_concat(*z.shape[2:])
    denoiser = model.denoiser
    loss_at = getattr(objective, "loss_at", None)  # absent for an objective that needs pixels
    terms = (lambda t, eps: loss_at(denoiser, z, cond, t, eps)) if loss_at else None
    return errors_by_snr(lambda x_t, t: denoiser(x_t, t, cond), denoiser.schedule, z, noise, bins, terms)


def plot(errors: list[dict[str, float]], path: Path) -> None:
    """Plot the rows, errors over log_snr.  Raises UserError without matplotlib."""
    from ldm import plotting

    names: Any = [name for name in ("loss", "x0_error", "eps_error") if name in errors[0]]
    figure = plotting.canvas(60 + 250 * len(names), 250)
    middle = [(row["log_snr_high"] + row["log_snr_low"]) / 2 for row in errors]
    for i, (name, colour) in enumerate(zip(names, (plotting.BLUE, plotting.RED, plotting.GREEN), strict=False)):
        axes = plotting.panel(figure, 52 + 250 * i, 28, 190, 170, name.replace("_", " "), x="log SNR")
        axes.plot(middle, [row[name] for row in errors], "-o", color=colour, lw=1.4, ms=3)
        axes.set(yscale="log")
        axes.minorticks_off()
        axes.grid(color=plotting.PALE, lw=0.5)
    figure.savefig(path, dpi=plotting.DPI, metadata={"Software": None})


def text(errors: list[dict[str, float]]) -> str:
    """Format the rows as a table for a terminal."""
    heads = list(errors[0])
    lines = ["".join(f"{head:>14}" for head in heads)]
    return "\n".join(
        [*lines, *("".join(f"{rows.format_cell(round(row[head], 5)):>14}" for head in heads) for row in errors)]
    )
