"""How well a model compresses held-out images: the variational bound in bits per dimension."""

from typing import Any

import torch

from ldm.diffusion.variance import bits_per_dim, decoder_nll, gaussian_nll, large, learned_range, small
from ldm.errors import UserError
from ldm.metrics.interval import bootstrap
from ldm.tensors import Noise

VARIANCES = {"small": small, "large": large, "learned": learned_range}


@torch.inference_mode()
def of_run(run: str, num: int, steps: int | None, variance: str | None, batch_size: int = 64) -> dict[str, Any]:
    """bits_per_dim of the first `num` held-out images under a run's averaged model, as told as it was trained (Ho et al. 2020, eq. 5).

    In pixel space of the images' 8-bit levels, which compares with papers; else of the latents' densities, which compares with nothing but
    runs in the same latent space.  steps: of the chain, None for all of the schedule's; fewer are a looser bound.  variance: of the model's
    steps, by default learned where it is, else small.  low, high: 95% of the mean over images.  Raises UserError.
    """
    from ldm.diffusion.times import trailing
    from ldm.load import config_of, load, run_folder
    from ldm.request import held_out
    from ldm.task import encoded

    folder = run_folder(run)
    learned = bool(config_of(folder).get("learned_variance"))
    variance = variance or ("learned" if learned else "small")
    if variance not in VARIANCES or (variance == "learned" and not learned):
        raise UserError(f"variance={variance}: expected small or large{', or learned' if learned else ': this model learned none'}")
    data, model = held_out(folder), load(run)
    schedule, denoiser = model.denoiser.schedule, model.denoiser
    chain = steps or int(getattr(schedule, "T", 1000))
    ts, num = trailing(schedule, chain), min(num, len(data))
    totals, priors, pixels = [], [], True
    for start in range(0, num, batch_size):
        rows = list(range(start, min(start + batch_size, num)))
        batch, noise = data.batch([(0, i) for i in rows]), Noise(0, rows)
        x0 = encoded(model, batch["image"])
        pixels = x0.shape == batch["image"].shape and torch.equal(x0.cpu(), batch["image"])
        cond = model.condition({**batch, "noise": noise}).to(x0).over(*x0.shape[-2:])
        bits = bits_per_dim(
            lambda x_t, t, cond=cond: denoiser(x_t, t, cond),  # type: ignore[misc]
            *(schedule, x0, ts, noise.stream("bits"), VARIANCES[variance], decoder_nll if pixels else gaussian_nll),
        )
        totals.append(bits["total"])
        priors.append(bits["prior"])
    total = torch.cat(totals).double().cpu()
    low, high = bootstrap(total)
    said = {"of": "pixels" if pixels else "latents", "variance": variance, "steps": chain, "n": num}
    return {"bits_per_dim": float(total.mean()), "low": low, "high": high, "prior": float(torch.cat(priors).mean()), **said}
