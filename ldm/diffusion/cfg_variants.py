"""Variants of classifier-free guidance: each is guidance.cfg plus a correction of its result."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoise, Denoised, Denoiser
from ldm.diffusion.guidance import denoise_parts, lerp, require_null, rescale_x0
from ldm.diffusion.prediction import X0, Flow, Prediction, solve
from ldm.diffusion.schedule import widen
from ldm.errors import ConfigError
from ldm.tensors import expand

# conditional and unconditional prediction (B, ...) -> what is added to unconditional + scale (conditional - it)
Correction = Callable[[Tensor, Tensor], Tensor]
BLUR = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # Burt & Adelson 1983, with a = 3/8
INTERPOLATION = {3: "linear", 4: "bilinear", 5: "trilinear"}  # of tensors with so many axes


def corrected_cfg(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    correction: Correction,
    quantity: Prediction,
    scale: float,
    interval: tuple[float, float],
    rescale: float,
) -> Denoise:
    """Return guidance.cfg with a correction computed from the two predictions in a given quantity.

    quantity: x0, eps, v or flow, in which the correction is defined; it is converted to x0 and eps at the same x_t.
    The other arguments are those of guidance.cfg, and so is the result of a correction of zero, bit for bit.
    """
    both = cond.cat(require_null(uncond, f"scale {scale}"))
    lo, hi = interval

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        if not lo <= t <= hi:
            return denoiser(x_t, t, cond)
        c, u = denoise_parts(denoiser, both, x_t, t)
        change = correct(denoiser, quantity, correction, x_t, t, c, u)
        x0, eps = (part + difference for part, difference in zip(lerp(u, c, scale), change, strict=True))
        if rescale:
            x0, eps = rescale_x0(denoiser, x_t, t, x0, c.x0, rescale)
        return Denoised(x0, eps, c.var_frac)

    return denoise


def correct(
    denoiser: Denoiser, quantity: Prediction, correction: Correction, x_t: Tensor, t: Tensor, c: Denoised, u: Denoised
) -> tuple[Tensor, Tensor]:
    """Return what a correction of a quantity changes in x0 and in eps, where x_t stays the same."""
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    row = quantity.coefficients(alpha, sigma)
    a, b = (expand(factor, x_t) for factor in row)
    values = (a * widen(part.x0) + b * widen(part.eps) for part in (c, u))
    change = correction(*values)
    x0, eps = solve(row, alpha, sigma, torch.zeros_like(change), change)
    return x0.to(x_t.dtype), eps.to(x_t.dtype)


def apg(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    scale: float = 1.0,
    eta: float = 0.0,
    norm_threshold: float | None = None,
    momentum: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """Return adaptive projected guidance of x0 (Sadat et al. 2024, algorithm 1).

    eta: factor on the part of the difference d = conditional - unconditional that is parallel to the conditional x0.
    norm_threshold: largest norm of d, over all values of a sample; None for no limit.
    momentum: beta of the running sum d + beta (sum before), at each evaluation from the first on; the paper takes
    negative ones. With eta 1, no threshold and no momentum it is guidance.cfg, whose other arguments it has.
    """
    before: list[Tensor] = []

    def correction(c: Tensor, u: Tensor) -> Tensor:
        difference = c - u
        update = difference + momentum * before.pop() if momentum and before else difference
        if momentum:
            before.append(update)
        if norm_threshold is not None:
            update = update * (norm_threshold / norm(update)).clamp(max=1)
        return (scale - 1) * (update - (1 - eta) * parallel(update, c) - difference)

    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    return corrected_cfg(denoiser, cond, uncond, correction, X0(), scale, interval, rescale)


def cfg_zero_star(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    scale: float = 1.0,
    zero_init: float = 0.04,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """Return CFG-Zero*: the unconditional velocity is scaled to fit the conditional one (Fan et al. 2025).

    s = <v_c, v_u> / |v_u|^2 minimises |v_c - s v_u|; guidance is then s v_u + scale (v_c - s v_u).
    zero_init: the velocity is zero at t above 1 - zero_init: in the first 4% of the steps of a uniform grid.
    The other arguments are those of guidance.cfg.
    Raises ConfigError with zero_init, for a schedule other than flow's, in which zero is not between data and noise.
    """
    check_zero_init(denoiser, zero_init)

    def correction(c: Tensor, u: Tensor) -> Tensor:
        factor = dot(c, u) / dot(u, u).clamp(min=torch.finfo(u.dtype).tiny)
        return (1 - scale) * (factor - 1) * u

    guided: Denoise
    if scale == 1:
        guided = lambda x_t, t: denoiser(x_t, t, cond)  # noqa: E731
    else:
        guided = corrected_cfg(denoiser, cond, uncond, correction, Flow(), scale, interval, rescale)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        if zero_init and t > 1 - zero_init:
            return Denoised(x_t, x_t)
        return guided(x_t, t)

    return denoise


def check_zero_init(denoiser: Denoiser, zero_init: float) -> None:
    """Raise ConfigError for a fraction outside [0, 1], or above 0 where the velocity is not eps - x0 (see Flow)."""
    if not 0 <= zero_init < 1:
        raise ConfigError(f"guidance.zero_init={zero_init}: expected a part of the time, at least 0 and below 1")
    alpha, sigma = denoiser.schedule.alpha_sigma(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    if zero_init and not torch.allclose(alpha + sigma, torch.ones_like(alpha)):
        raise ConfigError(
            f"guidance.zero_init={zero_init}: a velocity of zero has a meaning for flow matching alone; "
            "set guidance.zero_init=0, or train with schedule=flow"
        )


def magnitude_aware(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    scale: float = 1.0,
    alpha: float = 8.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """Return MAMBO-G: guidance of scale 1 + (scale - 1) exp(-alpha |c - u| / |u|) (arXiv 2508.03442).

    It is weak where the difference is large beside the unconditional prediction, as in the first steps. Both are those
    of the network's own quantity. With alpha 0 it is guidance.cfg, whose other arguments it has.
    """

    def correction(c: Tensor, u: Tensor) -> Tensor:
        ratio = norm(c - u) / norm(u)
        return (scale - 1) * torch.expm1(-alpha * ratio) * (c - u)

    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    return corrected_cfg(denoiser, cond, uncond, correction, denoiser.prediction, scale, interval, rescale)


def tcfg(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """Return tangential damping: u is replaced by its projection on the first right singular vector of (c, u).

    Kwon et al. 2025, algorithm 1; both are predictions in the network's own quantity, as vectors of all values of a
    sample. Where they are parallel, it is guidance.cfg, whose other arguments it has.
    """

    def correction(c: Tensor, u: Tensor) -> Tensor:
        return (1 - scale) * (main_part(u, c) - u)

    if scale == 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    return corrected_cfg(denoiser, cond, uncond, correction, denoiser.prediction, scale, interval, rescale)


def fdg(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    scale: float = 1.0,
    low_scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """Return frequency-decoupled guidance: `scale` for high, `low_scale` for low frequencies (Sadat et al. 2025).

    The frequencies are two levels of a Laplacian pyramid: low ones are those of the half-sized image. With equal scales
    it is guidance.cfg, whose other arguments it has.
    """

    def correction(c: Tensor, u: Tensor) -> Tensor:
        return (low_scale - scale) * low_frequencies(c - u)

    if scale == low_scale == 1:
        return lambda x_t, t: denoiser(x_t, t, cond)
    return corrected_cfg(denoiser, cond, uncond, correction, X0(), scale, interval, rescale)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each sample's values: (B, ...) and (B, ...) -> (B, 1, ...)."""
    return (a * b).sum(tuple(range(1, a.ndim)), keepdim=True)


def norm(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each sample's values, (B, 1, ...), at least the smallest normal number."""
    return dot(x, x).sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def parallel(x: Tensor, onto: Tensor) -> Tensor:
    """Return the part of each sample of x (B, ...) that is parallel to `onto`."""
    unit = onto / norm(onto)
    return dot(x, unit) * unit


def main_part(u: Tensor, c: Tensor) -> Tensor:
    """Return the part of u (B, ...) along the direction in which c^2 + u^2 is largest.

    That direction is the first right singular vector of the matrix with rows c and u: cos(angle) c + sin(angle) u up to
    its length, where tan(2 angle) = 2 <c, u> / (|c|^2 - |u|^2).
    """
    angle = torch.atan2(2 * dot(c, u), dot(c, c) - dot(u, u)) / 2
    return parallel(u, angle.cos() * c + angle.sin() * u)


def low_frequencies(x: Tensor) -> Tensor:
    """Return what a Laplacian pyramid of two levels has in its second: x (B, C, ...) blurred, halved, doubled, blurred.

    Raises ConfigError for a side below 3, which cannot be blurred.
    """
    if min(x.shape[2:]) < 3:
        raise ConfigError(f"guidance=fdg: a latent of {tuple(x.shape[2:])} cannot be blurred; expected sides from 3")
    mode = INTERPOLATION[x.ndim]
    half = F.interpolate(blur(x), [max(side // 2, 1) for side in x.shape[2:]], mode=mode, align_corners=False)
    return blur(F.interpolate(half, x.shape[2:], mode=mode, align_corners=False))


def blur(x: Tensor) -> Tensor:
    """Blur x (B, C, ...) by a binomial filter of 5 values along each axis, reflected at the border."""
    kernel = x.new_tensor(BLUR).view(1, 1, 5)
    for axis in range(2, x.ndim):
        rows = x.movedim(axis, -1)
        flat = F.pad(rows.reshape(-1, 1, rows.shape[-1]), (2, 2), mode="reflect")
        x = F.conv1d(flat, kernel).reshape(rows.shape).movedim(-1, axis)
    return x
