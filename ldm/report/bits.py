"""Measure how well a model compresses held-out images: the variational bound in bits per dimension."""

from typing import Any

import torch

from ldm.diffusion.variance import bits_per_dim, decoder_nll, fixed_large, fixed_small, gaussian_nll, learned_range
from ldm.errors import UserError
from ldm.metrics.interval import bootstrap
from ldm.tensors import KeyedNoise

VARIANCES = {"small": fixed_small, "large": fixed_large, "learned": learned_range}


@torch.inference_mode()
def of_run(run: str, num: int, steps: int | None, variance: str | None, batch_size: int = 64) -> dict[str, Any]:
    """Compute bits_per_dim of the first `num` held-out images under a run's EMA weights (Ho et al. 2020, eq. 5).

    In pixel space the bound is of the images' 8-bit levels, comparable with papers; otherwise of the latents'
    densities, comparable only with runs in the same latent space. The model is conditioned as in training.

    steps: length of the chain; None: all steps of the schedule. Fewer give a looser bound.
    variance: of the model's steps; None: learned if the model has it, else small.
    Returns the mean over images with its 95% interval (low, high) and the prior term.  Raises UserError.
    """
    from ldm.checkpoint.load import load_model, load_run_config
    from ldm.diffusion.grids import trailing
    from ldm.runs.folder import find_run
    from ldm.sampling.request import load_held_out
    from ldm.sampling.tasks import encode_latents

    folder = find_run(run)
    learned = bool(load_run_config(folder).get("learned_variance"))
    variance = variance or ("learned" if learned else "small")
    if variance not in VARIANCES or (variance == "learned" and not learned):
        raise UserError(
            f"variance={variance}: expected small or large"
            f"{', or learned' if learned else ': this model has no learned variance'}"
        )
    data, model = load_held_out(folder), load_model(run)
    schedule, denoiser = model.denoiser.schedule, model.denoiser
    chain = steps or int(getattr(schedule, "T", 1000))
    ts, num = trailing(schedule, chain), min(num, len(data))
    totals, priors, pixels = [], [], True
    for start in range(0, num, batch_size):
        rows = list(range(start, min(start + batch_size, num)))
        batch, noise = data.batch([(0, i) for i in rows]), KeyedNoise(0, rows)
        x0 = encode_latents(model, batch["image"])
        pixels = x0.shape == batch["image"].shape and torch.equal(x0.cpu(), batch["image"])
        cond = model.condition({**batch, "noise": noise}).to(x0).expand_concat(*x0.shape[2:])
        bits = bits_per_dim(
            lambda x_t, t, cond=cond: denoiser(x_t, t, cond),  # type: ignore[misc]
            *(schedule, x0, ts, noise.sampler_noise("bits"), VARIANCES[variance]),
            decoder_nll if pixels else gaussian_nll,
        )
        totals.append(bits["total"])
        priors.append(bits["prior"])
    total = torch.cat(totals).double().cpu()
    low, high = bootstrap(total)
    setting = {"of": "pixels" if pixels else "latents", "variance": variance, "steps": chain, "n": num}
    return {
        "bits_per_dim": float(total.mean()),
        "low": low,
        "high": high,
        "prior": float(torch.cat(priors).mean()),
        **setting,
    }
