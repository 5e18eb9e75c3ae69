"""Constraints: denoise -> denoise. They change x0 and recompute eps from x_t, so that (x0, eps) still make x_t.

They are applied after guidance; `constrained_guidance` combines the two into one guidance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoise, Denoised, Denoiser, eps_at
from ldm.diffusion.guidance import Guidance, cfg
from ldm.diffusion.schedule import Schedule
from ldm.tensors import expand


def keep_known(denoise: Denoise, schedule: Schedule, mask: Tensor, x0: Tensor) -> Denoise:
    """Replace the estimate by x0 where the mask is 1 (known); leave it where the mask is 0 (to be sampled).

    mask: broadcastable to x0 (B, ...), bool or in [0, 1]. Raises ValueError if it is not.
    """
    try:
        known = (mask > 0.5).expand(x0.shape)
    except RuntimeError:
        raise ValueError(
            f"the mask {tuple(mask.shape)} does not fit x0 {tuple(x0.shape)}; give it one channel and x0's size"
        ) from None
    return change_x0(denoise, schedule, lambda estimate: torch.where(known, x0, estimate))


def clip(denoise: Denoise, schedule: Schedule, lo: float = -1.0, hi: float = 1.0) -> Denoise:
    """Clip x0 to [lo, hi], for pixels (Ho et al. 2020, their code)."""
    return change_x0(denoise, schedule, lambda estimate: estimate.clamp(lo, hi))


def dynamic_threshold(denoise: Denoise, schedule: Schedule, quantile: float = 0.995, bound: float = 1.0) -> Denoise:
    """Clip x0 to the quantile of |x0| per sample and divide by it, where that exceeds bound.

    Dynamic thresholding (Saharia et al. 2022 (Imagen), section 2.3).
    """

    def threshold(x0: Tensor) -> Tensor:
        s = expand(x0.abs().flatten(1).quantile(quantile, dim=1).clamp(min=bound), x0)
        return x0.clamp(-s, s) * (bound / s)

    return change_x0(denoise, schedule, threshold)


def constrained_guidance(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    constraint: Callable[[Denoise, Schedule], Denoise],
    guidance: Guidance = cfg,
    scale: float = 1.0,
) -> Denoise:
    """Apply a constraint to the x0 of a guidance at `scale`.

    Imagen does so because a large scale drives x0 out of range.
    """
    return constraint(guidance(denoiser, cond, uncond, scale=scale), denoiser.schedule)


def change_x0(denoise: Denoise, schedule: Schedule, change: Callable[[Tensor], Tensor]) -> Denoise:
    """Replace the estimate x0 (B, ...) by change(x0)."""

    def constrained(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoise(x_t, t)
        x0 = change(estimate.x0)
        return Denoised(x0, eps_at(schedule, x_t, t, x0), estimate.var_frac)

    return constrained
