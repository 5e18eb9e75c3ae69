"""What one does with a trained model. A task is a few choices: where to start, which grid, what to be told; samplers know of none of it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.guidance import Guidance, cfg
from ldm.diffusion.sampler import Sampler, ddim
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.times import trailing
from ldm.model import LatentDiffusion
from ldm.tensors import Noise


def prior(schedule: Schedule, t: Tensor, noise: Tensor) -> Tensor:
    """The state at time t () where nothing is known of the data but its unit variance: noise times sqrt(alpha^2 + sigma^2)."""
    alpha, sigma = schedule.alpha_sigma(t)
    return torch.hypot(alpha, sigma).to(noise) * noise


@torch.inference_mode()
def draw(
    model: LatentDiffusion, batch: dict[str, Any], seeds: Sequence[int], ts: Tensor, sampler: Sampler = ddim, guidance: Guidance = cfg
) -> Tensor:
    """One image (B, C, H, W) in [-1, 1] for each seed, told what `batch` says: the same image for a seed at any batch size or rank.

    ts: descending grid (N + 1,).  sampler and guidance with their options bound.
    """
    model.eval()
    noise = Noise(0, list(seeds))
    like = next(model.denoiser.parameters()).new_empty(model.latent_shape(len(seeds)))
    denoise = guidance(model.denoiser, model.condition(batch).to(like), model.uncondition(batch).to(like))
    x = prior(model.denoiser.schedule, ts[0], noise.normal("start", like))
    z = sampler(denoise, model.denoiser.schedule, x, ts, noise.stream("sampler"))
    return model.decode(z)


def txt2img(
    model: LatentDiffusion,
    prompt: str | Sequence[str],
    num: int = 1,
    seed: int = 0,
    steps: int = 20,
    scale: float = 2.0,
    sampler: Sampler = ddim,
    guidance: Guidance = cfg,
) -> Tensor:
    """`num` images of each prompt, (num * prompts, C, H, W) in [-1, 1], with seeds seed, seed + 1, ...; scale is the guidance scale."""
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num)]
    seeds = range(seed, seed + len(prompts))
    ts = trailing(model.denoiser.schedule, steps)
    return draw(model, {"caption": prompts}, seeds, ts, sampler, partial(guidance, scale=scale))
