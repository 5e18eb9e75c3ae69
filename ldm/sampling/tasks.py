"""Sampling tasks: what is done with a trained model.

A task is a function (model, batch, noise, ts, options) -> SamplingPlan. It decides five things: the initial state, the
grid of times, the conditions, a constraint on the estimates, and how the result becomes images; samplers know nothing
of tasks.

batch holds the user's inputs, one row per image.  noise is keyed by the images' seeds.  ts is the sampler's grid,
descending. Images are (B, C, H, W) in [-1, 1]; masks are (B, 1, H, W), 1 where pixels are to be sampled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.conditioner.size import SIZE_KEYS, uncropped
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
    """All that defines a task's sampling, complete before the first step.

    start: the state (B, C, h, w) at ts[0].  ts: descending grid (N + 1,).  batch: the conditions.
    decode: converts the sampled z at ts[-1] to images.  wrap_denoise: applies the task's constraint to a denoise
    function.
    """

    start: Tensor
    ts: Tensor
    batch: Batch
    decode: Callable[[Tensor], Tensor]
    wrap_denoise: Callable[[Denoise], Denoise] = lambda denoise: denoise


Task = Callable[[LatentDiffusion, Batch, KeyedNoise, Tensor], SamplingPlan]
TaskFunction = TypeVar("TaskFunction", bound=Callable[..., SamplingPlan])


def reads(*keys: str) -> Callable[[TaskFunction], TaskFunction]:
    """Mark a task as one that uses these inputs of a batch itself; every other input must be a condition of the model.

    A task without this mark is not checked.
    """

    def mark(task: TaskFunction) -> TaskFunction:
        task.keys = keys  # type: ignore[attr-defined]
        return task

    return mark


@reads()
def generate(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, size: Sequence[int] | None = None
) -> SamplingPlan:
    """Sample from noise under all conditions in the batch (caption, label, map, boxes).

    size: (height, width) of the images in pixels, by default that of the training images.
    """
    return SamplingPlan(
        prior_sample(model.denoiser.schedule, ts[0], initial_noise(model, noise, size)), ts, batch, model.decode
    )


def unconditional(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, size: Sequence[int] | None = None
) -> SamplingPlan:
    """Sample from noise with every condition replaced by its null."""
    return generate(model, {"noise": noise}, noise, ts, size)


@reads("image")
def img2img(model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, strength: float = 0.6) -> SamplingPlan:
    """Add noise to batch["image"] up to time `strength` and sample from there (SDEdit: Meng et al. 2022, alg. 1)."""
    z, ts = encode_latents(model, batch["image"]), grids.start_at(ts, strength)
    return SamplingPlan(add_noise(model.denoiser.schedule, z, noise.normal("start", z), ts[0]), ts, batch, model.decode)


@reads("image")
def ddim_edit(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, strength: float = 1.0, source_prompt: str = ""
) -> SamplingPlan:
    """Invert batch["image"] to its noise at time `strength` under `source_prompt`, then sample under the batch's
    conditions.

    DDIM inversion (Song et al. 2021a, section 4.3). Sampling under `source_prompt` without guidance reproduces the
    image up to the discretization error.
    """
    z, schedule, ts = encode_latents(model, batch["image"]), model.denoiser.schedule, grids.start_at(ts, strength)
    # the first time after 0, at which z itself stands for the state
    first = 1 / grids.num_timesteps(schedule) if hasattr(schedule, "T") else 1e-3
    up = torch.cat([ts[ts > first], ts.new_tensor([first])])
    source = {**uncropped(len(z), *batch["image"].shape[-2:]), **batch, "caption": [source_prompt] * len(z)}
    cond = model.condition(source).to(z).expand_concat(*z.shape[2:])
    start = ddim_invert(lambda x_t, t: model.denoiser(x_t, t, cond), schedule, z, up, noise.sampler_noise("inversion"))
    return SamplingPlan(start, ts, batch, model.decode)


@reads("image", "mask")
def inpaint(model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor) -> SamplingPlan:
    """Sample batch["image"] where batch["mask"] is 1; a model conditioned on masked images receives this one.

    Known pixels are preserved exactly: as z at every step and at the end, and as pixels in the final image. A latent
    cell is known if all its pixels are; the encoder does not see what the mask covers.
    Raises ValueError for a mask of another shape.
    """
    image, mask = (batch[name].to(reference_tensor(model)) for name in ("image", "mask"))
    hole, shape = mask > 0.5, (len(image), 1, *image.shape[-2:])
    if hole.shape != shape:
        raise ValueError(f"mask of {tuple(hole.shape)}: expected {shape}, the image's size and one channel")
    z = encode_latents(model, fill_holes(image, hole))
    known = max_pool_mask(hole.to(z), model.autoencoder.factor) == 0
    wrap_denoise = partial(keep_known, schedule=model.denoiser.schedule, mask=known, x0=z)

    def decode(sampled: Tensor) -> Tensor:
        return torch.where(hole, model.decode(torch.where(known, z, sampled)), image)

    plan = generate(model, batch, noise, ts, image.shape[-2:])
    return replace(plan, wrap_denoise=wrap_denoise, decode=decode)


@reads("image")
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
    """Extend batch["image"] by sampled pixels on each side, leaving the image unchanged; the paddings are in pixels.

    Raises ConfigError unless a padding is positive and none is negative.
    """
    margins = (pad_left, pad_right, pad_top, pad_bottom)
    if min(margins) < 0 or not any(margins):
        names = "pad_left, pad_right, pad_top, pad_bottom"
        raise ConfigError(f"{names} = {margins}: expected pixels to add, on one side or more")
    image = batch["image"].to(reference_tensor(model))
    wider = F.pad(image, margins, mode="replicate")
    mask = F.pad(torch.zeros_like(image[:, :1]), margins, value=1.0)
    return inpaint(model, {**batch, "image": wider, "mask": mask}, noise, ts)


@reads()
def super_resolution(
    model: LatentDiffusion,
    batch: Batch,
    noise: KeyedNoise,
    ts: Tensor,
    scale: int = 4,
    noise_level: float = 0.0,
    back_projection_steps: int = 0,
) -> SamplingPlan:
    """Sample batch["low_res"] (B, C, H, W) at `scale` times its size.

    noise_level: of the noise added to low_res, for models trained with noise augmentation.
    back_projection_steps: corrections after which the downsampled result equals low_res, for a clean low_res from
    bicubic downsampling.
    """
    low_res = batch["low_res"]
    height, width = (scale * side for side in low_res.shape[-2:])
    plan = generate(model, {**batch, "level": noise_level}, noise, ts, (height, width))
    return replace(plan, decode=lambda z: back_project(model.decode(z), low_res, back_projection_steps))


def back_project(image: Tensor, low_res: Tensor, steps: int) -> Tensor:
    """Add to the image (B, C, H, W) what its bicubic downsampling lacks of low_res (B, C, h, w), `steps` times (Irani &
    Peleg 1991).
    """
    for _ in range(steps):
        small = F.interpolate(image, low_res.shape[-2:], mode="bicubic", antialias=True, align_corners=False)
        residual = low_res.to(image) - small
        image = image + F.interpolate(residual, image.shape[-2:], mode="bicubic", align_corners=False)
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
    """Sample image batch["index"] of `frames` images whose noise moves from that of seed_a to that of seed_b.

    The noise is interpolated spherically (Song et al. 2021a, section 5.3).  size: (height, width) in pixels.
    """
    fraction = torch.tensor([index / max(frames - 1, 1) for index in batch["index"]], dtype=torch.float64)
    a, b = (initial_noise(model, KeyedNoise(noise.seed, [seed] * len(noise)), size) for seed in (seed_a, seed_b))
    start = slerp(a, b, fraction)
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
    """Sample variations of the image of `source_seed`: its noise, moved spherically towards each image's own noise.

    variation_strength: how far, from 0 (the source image itself) to 1 (an independent image).  size: (height, width) in
    pixels.
    Raises ConfigError for a strength outside [0, 1].
    """
    if not 0 <= variation_strength <= 1:
        raise ConfigError(
            f"variation_strength={variation_strength}: "
            f"expected 0 (the image of seed {source_seed} itself) to 1 (another image)"
        )
    fraction = torch.full((len(noise),), variation_strength, dtype=torch.float64)
    start = slerp(
        initial_noise(model, KeyedNoise(noise.seed, [source_seed] * len(noise)), size),
        initial_noise(model, noise, size),
        fraction,
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
    keep_conditions: Sequence[str] = (),
) -> Tensor:
    """Sample one image (B, C, H, W) in [-1, 1] for each seed: the same image for a seed at any batch size or rank.

    batch: the inputs of the task and the conditions; a missing condition is the null.  batch["negative"]: captions that
    guidance leads away from; by default guidance leads away from the null of every condition but `keep_conditions`.
    ts: descending grid (N + 1,).
    sampler, guidance, task: with their options bound.
    """
    model.eval()
    noise = KeyedNoise(0, list(seeds))
    plan = task(model, {**batch, "noise": noise}, noise, ts)
    return run_plan(model, plan, noise, sampler, guidance, keep_conditions)


def run_plan(
    model: LatentDiffusion,
    plan: SamplingPlan,
    noise: KeyedNoise,
    sampler: Sampler,
    guidance: Guidance,
    keep_conditions: Sequence[str] = (),
) -> Tensor:
    """Sample the images (B, C, H, W) of a task's plan."""
    x = plan.start
    sides = [model.autoencoder.factor * side for side in x.shape[2:]]
    batch = {**(uncropped(len(x), *sides) if len(sides) == 2 else {}), **plan.batch}
    uncond_batch = {name: batch[name] for name in ("noise", *SIZE_KEYS, *keep_conditions) if name in batch}
    if "negative" in batch:
        uncond_batch["caption"] = batch["negative"]
    cond, uncond = (model.condition(part).to(x).expand_concat(*x.shape[2:]) for part in (batch, uncond_batch))
    denoise = plan.wrap_denoise(guidance(model.denoiser, replace(cond, label=batch.get("label")), uncond))
    return plan.decode(sampler(denoise, model.denoiser.schedule, x, plan.ts, noise.sampler_noise("sampler")))


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
    grid: Callable[[Schedule, int], Tensor] = grids.default_grid,
    **inputs: Tensor,
) -> Tensor:
    """Sample `num` images of each prompt, (num * prompts, C, H, W) in [-1, 1], with the seeds seed, seed + 1, ...

    scale: the guidance scale.  grid: (schedule, steps) -> times.
    inputs: what another task needs, one row for all images, as in
    txt2img(model, prompt, task=partial(img2img, strength=0.5), image=image) with image (1, C, H, W).
    """
    prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num)]
    seeds, rows = range(seed, seed + len(prompts)), list(range(len(prompts)))
    batch = {
        "caption": prompts,
        "index": rows,
        **{name: value.expand(len(prompts), *value.shape[1:]) for name, value in inputs.items()},
    }
    guided = partial(cast(Any, guidance), scale=scale)
    return sample(model, batch, seeds, grid(model.denoiser.schedule, steps), sampler, guided, task)


def prior_sample(schedule: Schedule, t: Tensor, noise: Tensor) -> Tensor:
    """Return the state at time t () for data known only to have unit variance: noise times sqrt(alpha^2 + sigma^2)."""
    alpha, sigma = schedule.alpha_sigma(t)
    return torch.hypot(alpha, sigma).to(noise) * noise


def slerp(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate spherically from a to b (B, ...), each row by its fraction (B,) of the arc (Shoemake 1985)."""
    x, y = a.flatten(1).double(), b.flatten(1).double()
    angle = torch.arccos(F.cosine_similarity(x, y).clamp(-1, 1))
    fraction = fraction.to(angle)
    parallel = angle.sin() < 1e-6
    u, v = (torch.where(parallel, w, (w * angle).sin() / angle.sin()) for w in (1 - fraction, fraction))
    return (expand(u, a) * a + expand(v, a) * b).to(a)


def fill_holes(image: Tensor, hole: Tensor) -> Tensor:
    """Fill the hole (B, 1, H, W) bool of an image (B, C, H, W) from its edge inwards, each pixel by the mean of its
    known neighbours.
    """
    known, image = (~hole).to(image), image.masked_fill(hole, 0)
    while True:
        weight = F.avg_pool2d(known, 3, 1, 1)
        edge = (known == 0) & (weight > 0)
        if not edge.any():
            return image
        image = torch.where(edge, F.avg_pool2d(image, 3, 1, 1) / weight.clamp(min=1 / 18), image)
        known = known + edge.to(known)


def initial_noise(model: LatentDiffusion, noise: KeyedNoise, size: Sequence[int] | None = None) -> Tensor:
    """Draw standard normal noise (B, C, h, w), one row per seed; size: (height, width) of the images in pixels."""
    return noise.normal("start", reference_tensor(model).new_empty(model.latent_shape(len(noise), size)))


def encode_latents(model: LatentDiffusion, image: Tensor) -> Tensor:
    """Encode images to z, on the denoiser's device and in its dtype."""
    return model.encode(image.to(reference_tensor(model))).to(reference_tensor(model))


def reference_tensor(model: LatentDiffusion) -> Tensor:
    """Return a tensor of the denoiser's device and dtype."""
    return next(model.denoiser.parameters())
