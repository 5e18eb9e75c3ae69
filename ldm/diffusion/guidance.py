"""Guidance: from a denoiser and its conditions to a denoise function (x_t, t) -> Denoised, which samplers call."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoise, Denoised, Denoiser, eps_at
from ldm.errors import ConfigError

Guidance = Callable[..., Denoise]  # (denoiser, cond, uncond, **options); most have an option `scale`


def cfg(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """Return classifier-free guidance uncond + scale (cond - uncond), both evaluated in one call.

    Ho & Salimans 2022, eq. 6, with w = scale - 1.
    interval: the (lo, hi) of t, inclusive, in which it acts (Kynkaanniemi et al. 2024); elsewhere, and at scale 1, only
    cond is evaluated.
    rescale: in [0, 1], moves the standard deviation of x0 towards the conditional one's (Lin et al. 2023, eq. 15-16).
    Raises ConfigError if scale is not 1 and there is no uncond.
    """
    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    both = cond.cat(require_null(uncond, f"scale {scale}"))
    lo, hi = interval

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        if not lo <= t <= hi:
            return denoiser(x_t, t, cond)
        conditional, unconditional = denoise_parts(denoiser, both, x_t, t)
        x0, eps = lerp(unconditional, conditional, scale)
        if rescale:
            x0, eps = rescale_x0(denoiser, x_t, t, x0, conditional.x0, rescale)
        return Denoised(x0, eps, conditional.var_frac)

    return denoise


def lerp(start: Denoised, end: Denoised, scale: float) -> tuple[Tensor, Tensor]:
    """Return x0 and eps of start + scale (end - start)."""
    return start.x0.lerp(end.x0, scale), start.eps.lerp(end.eps, scale)


def rescale_x0(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, x0: Tensor, conditional: Tensor, rescale: float
) -> tuple[Tensor, Tensor]:
    """Return x0, its standard deviation moved towards the conditional x0's, and its eps (Lin et al. 2023, eq. 15-16).

    rescale: in [0, 1], by how much.
    """
    x0 = x0.lerp(x0 * (_std(conditional) / _std(x0)), rescale)
    return x0, eps_at(denoiser.schedule, x_t, t, x0)


def denoise_parts(denoiser: Denoiser, stacked: Condition, x_t: Tensor, t: Tensor, parts: int = 2) -> list[Denoised]:
    """Return Denoised under each of the equal parts of a stacked condition, in one call of the network."""
    x0, eps, var_frac = denoiser(torch.cat([x_t] * parts), t, stacked)
    var_fracs = [None] * parts if var_frac is None else var_frac.chunk(parts)
    return [Denoised(*part) for part in zip(x0.chunk(parts), eps.chunk(parts), var_fracs, strict=True)]


def cfg_channels(
    denoiser: Denoiser, cond: Condition, uncond: Condition | None, scale: float = 1.0, channels: int = 3
) -> Denoise:
    """Return classifier-free guidance of the first `channels` channels only; the others are the conditional ones.

    DiT's published samples were generated in this way.
    Raises ConfigError if there is no uncond.
    """
    both = cond.cat(require_null(uncond, f"scale {scale}"))

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        conditional, unconditional = denoise_parts(denoiser, both, x_t, t)
        x0, eps = (
            torch.cat([u[:, :channels].lerp(c[:, :channels], scale), c[:, channels:]], dim=1)
            for u, c in [(unconditional.x0, conditional.x0), (unconditional.eps, conditional.eps)]
        )
        return Denoised(x0, eps, conditional.var_frac)

    return denoise


def cfg_image_text(
    denoiser: Denoiser, cond: Condition, uncond: Condition | None, scale: float = 1.0, image_scale: float = 1.0
) -> Denoise:
    """Return guidance by an image and by a text, with a scale for each; three evaluations in one call.

    e(0, 0) + image_scale (e(image, 0) - e(0, 0)) + scale (e(image, text) - e(image, 0)): Brooks et al. 2023, eq. 3.
    The image is what is concatenated to x_t, cond.concat; the text is all other conditions. With both scales 1, only
    cond is evaluated.
    Raises ConfigError if a scale is not 1 and there is no uncond, or no image.
    """
    if scale == image_scale == 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    uncond = require_null(uncond, f"scale {scale}, image_scale {image_scale}")
    if cond.concat is None:
        raise ConfigError("guidance=cfg_image_text: this model has no image condition; choose guidance=cfg")
    stacked = cond.cat(replace(uncond, concat=cond.concat), uncond)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        full, image, null = denoise_parts(denoiser, stacked, x_t, t, parts=3)
        x0, eps = (
            n + image_scale * (i - n) + scale * (f - i)
            for f, i, n in [(full.x0, image.x0, null.x0), (full.eps, image.eps, null.eps)]
        )
        return Denoised(x0, eps, full.var_frac)

    return denoise


def autoguidance(
    denoiser: Denoiser, cond: Condition, uncond: Condition | None, weak: Denoiser | None = None, scale: float = 1.0
) -> Denoise:
    """Return weak + scale (denoiser - weak), weak being smaller or less trained (Karras et al. 2024a).

    uncond is not used.
    Raises ConfigError if there is no weak Denoiser.
    """
    if weak is None:
        raise ConfigError("autoguidance needs a second, weaker denoiser; pass one as `weak`")

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        strong, other = denoiser(x_t, t, cond), weak(x_t, t, cond)
        return Denoised(*lerp(other, strong, scale), strong.var_frac)

    return denoise


def classifier(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    log_prob: Callable[[Tensor, Tensor], Tensor],
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Denoise:
    """Return classifier guidance eps - scale sigma grad log p(y | x_t) (Dhariwal & Nichol 2021, algorithm 2).

    uncond is not used.
    log_prob: (x_t, net_time (B,)) -> log p(y | x_t) (B,), of a classifier trained on noisy states; not called where x_t
    has no signal.
    interval: the (lo, hi) of t, inclusive, in which it acts: x0 moves by scale sigma^2 / alpha grad, unbounded at the
    noise end.
    """
    lo, hi = interval

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoiser(x_t, t, cond)
        alpha, sigma = denoiser.schedule.alpha_sigma(t)
        if alpha == 0 or not lo <= t <= hi:
            return estimate
        with torch.inference_mode(False), torch.enable_grad():
            x_in = x_t.clone().detach().requires_grad_()
            grad = torch.autograd.grad(log_prob(x_in, denoiser.net_time(x_t, t)).sum(), x_in)[0]
        eps = estimate.eps - scale * sigma * grad
        return Denoised((x_t - sigma * eps) / alpha, eps, estimate.var_frac)

    return denoise


def guidance_embedded(denoiser: Denoiser, cond: Condition, uncond: Condition | None, scale: float = 1.0) -> Denoise:
    """Return one evaluation of a network that takes the scale as a condition (Meng et al. 2023, section 3.1).

    uncond is not used.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        return denoiser(x_t, t, replace(cond, scale=x_t.new_full((len(x_t),), scale)))

    return denoise


def require_null(uncond: Condition | None, option: str) -> Condition:
    """Return uncond. Raises ConfigError naming the option that needs it if it is None."""
    if uncond is None:
        raise ConfigError(
            f"guidance with {option} needs a null condition and has none; train with condition dropout, or use scale 1"
        )
    return uncond


def _std(x: Tensor) -> Tensor:
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
