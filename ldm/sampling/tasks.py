"""What one does with a trained model. A task is five choices: start, grid, condition, constraint, finish; samplers know of none of them.

A task is a function (model, batch, noise, ts, options) -> Choices: batch holds what the person gave, a row for each image; noise is keyed
by the images' seeds; ts is the sampler's grid.  Images are (B, C, H, W) in [-1, 1], masks (B, 1, H, W) with 1 = to be drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.conditioner.spatial import max_pool_mask
from ldm.diffusion import grids
from ldm.diffusion.constraint import keep_known
from ldm.diffusion.denoiser import Denoise
from ldm.diffusion.guidance import Guidance, cfg
from ldm.diffusion.sampler import Sampler, ddim, ddim_invert
from ldm.diffusion.schedule import Schedule, add_noise
from ldm.errors import ConfigError
from ldm.model import LatentDiffusion
from ldm.tensors import KeyedNoise, expand

Batch = dict[str, Any]


@dataclass(frozen=True)
class SamplingPlan:
    """All that makes a task, settled before the first step.

    start: the state (B, C, h, w) at ts[0].  ts: descending grid (N + 1,).  told: the condition, as a batch.  finish: the drawn z at ts[-1]
    into images.  constraint: what wraps the denoise function.
    """

    start: Tensor
    ts: Tensor
    batch: Batch
    decode: Callable[[Tensor], Tensor]
    wrap_denoise: Callable[[Denoise], Denoise] = lambda denoise: denoise


Task = Callable[[LatentDiffusion, Batch, KeyedNoise, Tensor], SamplingPlan]


def generate(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, size: Sequence[int] | None = None
) -> SamplingPlan:
    """From noise alone, told all that the batch holds: words, a class, a map, boxes; size: (height, width), by default the training's."""
    return SamplingPlan(
        prior_sample(model.denoiser.schedule, ts[0], initial_noise(model, noise, size)), ts, batch, model.decode
    )


def unconditional(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, size: Sequence[int] | None = None
) -> SamplingPlan:
    """From noise alone, told nothing: every condition is the null."""
    return generate(model, {"noise": noise}, noise, ts, size)


def img2img(model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, strength: float = 0.6) -> SamplingPlan:
    """batch["image"] with noise up to time `strength`, drawn anew from there: restyled by what is told (Meng et al. 2022, algorithm 1)."""
    z, ts = encode_latents(model, batch["image"]), grids.start_at(ts, strength)
    return SamplingPlan(add_noise(model.denoiser.schedule, z, noise.normal("start", z), ts[0]), ts, batch, model.decode)


def ddim_edit(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, strength: float = 1.0, source_prompt: str = ""
) -> SamplingPlan:
    """batch["image"] followed back to its own noise at time `strength` under the caption `source`, then drawn as told (DDIM inversion).

    Song et al. 2021a, section 4.3; told `source` again, without guidance, it comes back but for the error of the steps.
    """
    z, schedule, ts = encode_latents(model, batch["image"]), model.denoiser.schedule, grids.start_at(ts, strength)
    first = 1 / grids.num_timesteps(schedule) if hasattr(schedule, "T") else 1e-3  # where z stands for the state
    up = torch.cat([ts[ts > first], ts.new_tensor([first])])
    cond = model.condition({**batch, "caption": [source_prompt] * len(z)}).to(z).expand_concat(*z.shape[-2:])
    start = ddim_invert(lambda x_t, t: model.denoiser(x_t, t, cond), schedule, z, up, noise.sampler_noise("inversion"))
    return SamplingPlan(start, ts, batch, model.decode)


def inpaint(model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor) -> SamplingPlan:
    """batch["image"] drawn anew where batch["mask"] is 1; a model that is told masked images is told this one.

    What is known is kept exactly: at every step and at the end as z, in the finished image as pixels.  A latent cell is known if all its
    pixels are; the encoder does not see what the mask covers.
    """
    image, drawn = (batch[name].to(reference_tensor(model)) for name in ("image", "mask"))
    hole = drawn > 0.5
    if hole.shape != (len(image), 1, *image.shape[-2:]):
        raise ValueError(
            f"mask of {tuple(hole.shape)}: expected {(len(image), 1, *image.shape[-2:])}, the image's size and one channel"
        )
    z = encode_latents(model, fill_holes(image, hole))
    known = max_pool_mask(hole.to(z), model.autoencoder.factor) == 0
    keep = partial(keep_known, schedule=model.denoiser.schedule, mask=known, x0=z)

    def finish(new: Tensor) -> Tensor:
        return torch.where(hole, model.decode(torch.where(known, z, new)), image)

    whole = generate(model, batch, noise, ts, image.shape[-2:])
    return replace(whole, wrap_denoise=keep, decode=finish)


def outpaint(
    model: LatentDiffusion,
    batch: Batch,
    noise: KeyedNoise,
    ts: Tensor,
    pad_left: int = 0,
    pad_right: int = 0,
    pad_top: int = 0,
    pad_bottom: int = 0,
) -> SamplingPlan:
    """batch["image"] with so many pixels drawn on each side; the image itself stays as it is. Raises ConfigError where nothing is asked."""
    margins = (pad_left, pad_right, pad_top, pad_bottom)
    if min(margins) < 0 or not any(margins):
        raise ConfigError(f"left, right, top, bottom = {margins}: expected pixels to add, on one side or more")
    image = batch["image"].to(reference_tensor(model))
    wider = F.pad(image, margins, mode="replicate")
    mask = F.pad(torch.zeros_like(image[:, :1]), margins, value=1.0)
    return inpaint(model, {**batch, "image": wider, "mask": mask}, noise, ts)


def super_resolution(
    model: LatentDiffusion,
    batch: Batch,
    noise: KeyedNoise,
    ts: Tensor,
    scale: int = 4,
    noise_level: float = 0.0,
    back_projection_steps: int = 0,
) -> SamplingPlan:
    """batch["low_res"] (B, C, H, W) drawn `scale` times as large; level: of the noise mixed into it, for models trained with some.

    rounds: of back-projection, after which the drawn image, shrunk, is low_res; for one that was shrunk bicubically and is clean.
    """
    low_res = batch["low_res"]
    height, width = (scale * side for side in low_res.shape[-2:])
    whole = generate(model, {**batch, "level": noise_level}, noise, ts, (height, width))
    return replace(whole, decode=lambda z: back_project(model.decode(z), low_res, back_projection_steps))


def back_project(image: Tensor, low_res: Tensor, rounds: int) -> Tensor:
    """The image (B, C, H, W) plus what it lacks of low_res (B, C, h, w) when shrunk bicubically, `rounds` times (Irani & Peleg 1991)."""
    for _ in range(rounds):
        lacking = low_res.to(image) - F.interpolate(
            image, low_res.shape[-2:], mode="bicubic", antialias=True, align_corners=False
        )
        image = image + F.interpolate(lacking, image.shape[-2:], mode="bicubic", align_corners=False)
    return image


def interpolate(
    model: LatentDiffusion,
    batch: Batch,
    noise: KeyedNoise,
    ts: Tensor,
    seed_a: int = 0,
    seed_b: int = 1,
    frames: int = 16,
    size: Sequence[int] | None = None,
) -> SamplingPlan:
    """Image batch["index"] of `frames` on the way from seed `first` to seed `last` (Song et al. 2021a, section 5.3)."""
    part = torch.tensor([index / max(frames - 1, 1) for index in batch["index"]], dtype=torch.float64)
    a, b = (initial_noise(model, KeyedNoise(noise.seed, [seed] * len(noise)), size) for seed in (seed_a, seed_b))
    start = slerp(a, b, part)
    return replace(generate(model, batch, noise, ts, size), start=prior_sample(model.denoiser.schedule, ts[0], start))


def variations(
    model: LatentDiffusion,
    batch: Batch,
    noise: KeyedNoise,
    ts: Tensor,
    source_seed: int = 0,
    variation_strength: float = 0.2,
    size: Sequence[int] | None = None,
) -> SamplingPlan:
    """Variations of the image of seed `of`: its noise, turned towards each image's own by `amount`, 0 nothing and 1 all the way."""
    if not 0 <= variation_strength <= 1:
        raise ConfigError(
            f"variation_strength={variation_strength}: expected 0 (the image of seed {source_seed} itself) to 1 (another image)"
        )
    part = torch.full((len(noise),), variation_strength, dtype=torch.float64)
    start = slerp(
        initial_noise(model, KeyedNoise(noise.seed, [source_seed] * len(noise)), size),
        initial_noise(model, noise, size),
        part,
    )
    return replace(generate(model, batch, noise, ts, size), start=prior_sample(model.denoiser.schedule, ts[0], start))


@torch.inference_mode()
def sample(
    model: LatentDiffusion,
    batch: Batch,
    seeds: Sequence[int],
    ts: Tensor,
    sampler: Sampler = ddim,
    guidance: Guidance = cfg,
    task: Task = generate,
    hold: Sequence[str] = (),
) -> Tensor:
    """One image (B, C, H, W) in [-1, 1] for each seed: the same image for a seed at any batch size or rank.

    batch: what the task needs and what the model is told; what it lacks is the null condition.  batch["negative"]: captions that guidance
    leads away from; by default from the null of everything but the keys to `hold`.  ts: descending grid (N + 1,).
    sampler, guidance and task with their options bound.
    """
    model.eval()
    noise = KeyedNoise(0, list(seeds))
    return run_plan(model, task(model, {**batch, "noise": noise}, noise, ts), noise, sampler, guidance, hold)


def run_plan(
    model: LatentDiffusion,
    choices: SamplingPlan,
    noise: KeyedNoise,
    sampler: Sampler,
    guidance: Guidance,
    hold: Sequence[str] = (),
) -> Tensor:
    """The images (B, C, H, W) that a task's choices come to."""
    told = choices.batch
    untold = {name: told[name] for name in ("noise", *hold) if name in told}
    if "negative" in told:
        untold["caption"] = told["negative"]
    x = choices.start
    cond, uncond = (model.condition(one).to(x).expand_concat(*x.shape[-2:]) for one in (told, untold))
    denoise = choices.wrap_denoise(guidance(model.denoiser, replace(cond, label=told.get("label")), uncond))
    return choices.decode(sampler(denoise, model.denoiser.schedule, x, choices.ts, noise.sampler_noise("sampler")))


def txt2img(
    model: LatentDiffusion,
    prompt: str | Sequence[str],
    num: int = 1,
    seed: int = 0,
    steps: int = 20,
    scale: float = 2.0,
    sampler: Sampler = ddim,
    guidance: Guidance = cfg,
    task: Task = generate,
    **given: Tensor,
) -> Tensor:
    """`num` images of each prompt, (num * prompts, C, H, W) in [-1, 1], with seeds seed, seed + 1, ...; scale is the guidance scale.

    given: what another task needs, one for all: task=partial(img2img, strength=0.5), image=(1, C, H, W).
    """
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num)]
    seeds, rows = range(seed, seed + len(prompts)), list(range(len(prompts)))
    batch = {
        "caption": prompts,
        "index": rows,
        **{name: one.expand(len(prompts), *one.shape[1:]) for name, one in given.items()},
    }
    guided = partial(cast(Any, guidance), scale=scale)
    return sample(model, batch, seeds, grids.trailing(model.denoiser.schedule, steps), sampler, guided, task)


def prior_sample(schedule: Schedule, t: Tensor, noise: Tensor) -> Tensor:
    """The state at time t () where nothing is known of the data but its unit variance: noise times sqrt(alpha^2 + sigma^2)."""
    alpha, sigma = schedule.alpha_sigma(t)
    return torch.hypot(alpha, sigma).to(noise) * noise


def slerp(a: Tensor, b: Tensor, part: Tensor) -> Tensor:
    """From a to b (B, ...) along the great circle, each row by its part (B,) of the way (Shoemake 1985): as long as they are."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    angle = torch.arccos(F.cosine_similarity(x, y).clamp(-1, 1))
    part = part.to(angle)
    near = angle.sin() < 1e-6
    u, v = (torch.where(near, line, (line * angle).sin() / angle.sin()) for line in (1 - part, part))
    return (expand(u, a) * a + expand(v, a) * b).to(a)


def fill_holes(image: Tensor, hole: Tensor) -> Tensor:
    """The image (B, C, H, W) with its hole (B, 1, H, W) bool filled from the edge inwards by the mean of what is next to it."""
    known, image = (~hole).to(image), image.masked_fill(hole, 0)
    while True:
        weight = F.avg_pool2d(known, 3, 1, 1)
        fresh = (known == 0) & (weight > 0)
        if not fresh.any():
            return image
        image = torch.where(fresh, F.avg_pool2d(image, 3, 1, 1) / weight.clamp(min=1 / 18), image)
        known = known + fresh.to(known)


def initial_noise(model: LatentDiffusion, noise: KeyedNoise, size: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise (B, C, h, w), one a seed."""
    return noise.normal("start", reference_tensor(model).new_empty(model.latent_shape(len(noise), size)))


def encode_latents(model: LatentDiffusion, image: Tensor) -> Tensor:
    """z of images, in the denoiser's place and precision."""
    return model.encode(image.to(reference_tensor(model))).to(reference_tensor(model))


def reference_tensor(model: LatentDiffusion) -> Tensor:
    """A tensor of the denoiser's device and dtype."""
    return next(model.denoiser.parameters())
