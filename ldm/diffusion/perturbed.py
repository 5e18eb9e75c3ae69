"""Guidance away from the network's own prediction with some of its layers perturbed (PAG, SEG, skip-layer guidance)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoise, Denoised, Denoiser
from ldm.diffusion.guidance import cfg, denoise_parts, lerp, require_null, rescale_x0
from ldm.errors import ConfigError

Perturb = Callable[[nn.Module], Any]  # a network -> context manager within which it is perturbed
Attend = Callable[..., Tensor]  # q, k, v (B, heads, N, d), mask -> (B, heads, N, d)


def perturbed(
    denoiser: Denoiser,
    cond: Condition,
    uncond: Condition | None,
    perturb: Perturb,
    scale: float = 1.0,
    perturbed_scale: float = 3.0,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Denoise:
    """Return guidance.cfg + perturbed_scale (cond - perturbed cond), one evaluation more.

    perturb: perturbs the network, as identity_attention, smoothed_attention or skipped_layers do: perturbed-attention
    guidance (Ahn et al. 2024, eq. 16), smoothed energy guidance (Hong 2024, eq. 14), skip-layer guidance (Stability AI
    2024, of SD 3.5).
    interval: in which it and cfg act; elsewhere only cond is evaluated.  rescale: as in guidance.cfg, of the whole.
    With perturbed_scale 0 it is guidance.cfg; with scale 1 it needs no uncond.
    """
    if not perturbed_scale:
        return cfg(denoiser, cond, uncond, scale, interval, rescale)
    both = None if scale == 1 else cond.cat(require_null(uncond, f"scale {scale}"))
    lo, hi = interval

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        if not lo <= t <= hi:
            return denoiser(x_t, t, cond)
        if both is None:
            c = guided = denoiser(x_t, t, cond)
        else:
            c, u = denoise_parts(denoiser, both, x_t, t)
            guided = Denoised(*lerp(u, c, scale))
        with perturb(denoiser.net):
            weak = denoiser(x_t, t, cond)
        x0 = guided.x0 + perturbed_scale * (c.x0 - weak.x0)
        eps = guided.eps + perturbed_scale * (c.eps - weak.eps)
        if rescale:
            x0, eps = rescale_x0(denoiser, x_t, t, x0, c.x0, rescale)
        return Denoised(x0, eps, c.var_frac)

    return denoise


@contextmanager
def identity_attention(net: nn.Module, layers: Sequence[str] | None = None) -> Iterator[None]:
    """Let self-attention return its values, as if the attention map were the identity (Ahn et al. 2024, eq. 14).

    layers: names of the layers, see `self_attentions`.
    """
    with replaced_attention(net, layers, lambda attend: lambda q, k, v, mask=None: v):
        yield


@contextmanager
def smoothed_attention(
    net: nn.Module, layers: Sequence[str] | None = None, sigma: float | None = None
) -> Iterator[None]:
    """Blur the queries of self-attention over the tokens' positions (Hong 2024, eq. 12).

    sigma: of the Gaussian, in tokens; None for infinity, in which each query is the mean.  layers: see
    `self_attentions`.  A finite sigma needs square grids of tokens.
    """

    def change(attend: Attend) -> Attend:
        return lambda q, k, v, mask=None: attend(blur_queries(q, sigma), k, v, mask)

    with replaced_attention(net, layers, change):
        yield


@contextmanager
def skipped_layers(net: nn.Module, layers: Sequence[str] | None = None) -> Iterator[None]:
    """Let layers return their input: blocks of a transformer, by name; None for the block in the middle.

    Raises ConfigError for a layer whose output has another shape than its input.
    """

    def skip(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if inputs[0].shape != output.shape:
                raise ConfigError(
                    f"guidance.perturb.layers: {name} changes its input's shape; expected a block that does not"
                )
            return inputs[0]

        return hook

    with ExitStack() as stack:
        for name, module in named_layers(net, middle_blocks(net) if layers is None else layers).items():
            stack.callback(module.register_forward_hook(skip(name)).remove)
        yield


@contextmanager
def replaced_attention(
    net: nn.Module, layers: Sequence[str] | None, change: Callable[[Attend], Attend]
) -> Iterator[None]:
    """Replace the attention function of the self-attentions of some layers within the block."""
    with ExitStack() as stack:
        for module in self_attentions(net, layers):
            stack.callback(setattr, module, "attend", module.attend)
            module.attend = change(module.attend)
        yield


def self_attentions(net: nn.Module, layers: Sequence[str] | None = None) -> list[Any]:
    """Return the self-attentions in the layers of these names; None for the one in the middle of the network.

    Raises ConfigError if there are none.
    """
    names = middle_attention(net) if layers is None else layers
    found = [
        module for layer in named_layers(net, names).values() for module in layer.modules() if is_self_attention(module)
    ]
    if not found:
        raise ConfigError(f"guidance.perturb.layers: {', '.join(names) or 'the network'} has no self-attention")
    return found


def named_layers(net: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Return the layers of a network by name, also of one that is wrapped for sampling.

    Raises ConfigError for a name that it does not have.
    """
    modules = dict(net.named_modules())
    found: dict[str, nn.Module] = {}
    for name in names:
        matches = {path: module for path, module in modules.items() if path == name or path.endswith(f".{name}")}
        if not matches:
            some = ", ".join(attention_names(net)[:8]) or "none of them self-attention"
            raise ConfigError(f"guidance.perturb.layers: the network has no layer {name!r}; it has {some}, ...")
        found |= matches
    return found


def attention_names(net: nn.Module) -> list[str]:
    """Return the names of a network's self-attentions, in the order of its modules."""
    return [name for name, module in net.named_modules() if is_self_attention(module)]


def is_self_attention(module: nn.Module) -> bool:
    """Return whether a module is a self-attention: it has one projection `qkv`, and a function `attend`."""
    return hasattr(module, "qkv") and hasattr(module, "attend")


def middle_attention(net: nn.Module) -> list[str]:
    """Return the name of the self-attention in a U-Net's middle, or else of the one halfway through the network.

    The name is that in the innermost network, if one is wrapped as the attribute `net` of another.
    """
    while isinstance(inner := getattr(net, "net", None), nn.Module):
        net = inner
    names = attention_names(net)
    in_middle = [name for name in names if any(part.startswith("middle") for part in name.split("."))]
    return (in_middle or names[(len(names) - 1) // 2 :])[:1]


def middle_blocks(net: nn.Module) -> list[str]:
    """Return the name of the block that has the self-attention of `middle_attention`."""
    return [name.rpartition(".")[0] for name in middle_attention(net)]


def blur_queries(q: Tensor, sigma: float | None) -> Tensor:
    """Blur queries (B, heads, N, d) over a square grid of N tokens by a Gaussian of `sigma` tokens; None: infinite.

    The weights of each token's neighbours within the grid have the sum 1.
    Raises ConfigError for a finite sigma if the grid is not square.
    """
    if sigma is None:
        return q.mean(2, keepdim=True).expand_as(q)
    side = math.isqrt(q.shape[2])
    if side * side != q.shape[2]:
        raise ConfigError(f"guidance.perturb.sigma={sigma}: {q.shape[2]} tokens are no square; expected sigma=null")
    place = torch.arange(side, device=q.device, dtype=torch.float32)
    weights = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum(1, keepdim=True)).to(q.dtype)
    grid = q.unflatten(2, (side, side))  # (B, heads, rows, columns, d)
    return torch.einsum("ij,kl,bhjld->bhikd", weights, weights, grid).flatten(2, 3)
