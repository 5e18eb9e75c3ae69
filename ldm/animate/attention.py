"""Figure of where the words of a prompt act: cross-attention maps over the image."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm import plotting
from ldm.animate import arguments
from ldm.animate.animation import Animation
from ldm.diffusion import grids
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import ddim
from ldm.errors import UserError
from ldm.model import LatentDiffusion
from ldm.net.attention import AttentionFn, CrossAttention
from ldm.sampling import tasks


class Maps(NamedTuple):
    """An image and the attention to the words of its prompt.

    image: (C, H, W) in [-1, 1].  words: L of them.  maps: (L, h, w), each word's share of the attention at each
        position;
    the shares at a position sum to 1.
    """

    image: Tensor
    words: Sequence[str]
    maps: Tensor


def attention(
    run: str,  # a run folder, or a folder of runs: the newest; the model must be conditioned on text
    prompt: str,  # any text
    steps: int = 20,  # of DDIM
    scale: float = 3.0,  # of the guidance
    seed: int = 0,  # the image's
) -> Animation:
    """Show an image and, for each word of its prompt, where the network attended to it (mean of steps, layers, heads).

    At each position the shares of all words and of the start and end tokens sum to 1 (cf. Tang et al. 2022, DAAM).
    """
    arguments.require_at_least(1, steps=steps)
    model = arguments.model_of(run)
    return Animation(_figure(maps(model, prompt, grids.default_grid(model.denoiser.schedule, steps), scale, seed)), 1)


@torch.inference_mode()
def maps(model: LatentDiffusion, prompt: str, ts: Tensor, scale: float, seed: int = 0) -> Maps:
    """Compute the Maps of one prompt sampled on the grid.  Raises UserError for a model without attention to words."""
    layers = [module for module in model.denoiser.net.modules() if isinstance(module, CrossAttention)]
    tokenize = getattr(model.conditioner, "tokenize", None)
    if not layers or tokenize is None:
        raise UserError(
            "this model does not attend to words: attention needs a network with cross-attention and a text conditioner"
        )
    batch = {"index": [0], "caption": [prompt]}
    height, width = model.latent_shape(1)[-2:]
    shares: list[Tensor] = []
    with record_attention(layers, shares):
        image = tasks.sample(model, batch, [seed], ts, ddim, partial(cfg, scale=scale))[0]
    read = model.condition(batch).mask
    length = shares[0].shape[-1] if read is None else int(read.sum())
    resized = [resize_map(share[0, :, :, :length].mean(0), (height, width)) for share in shares]
    mean = torch.stack(resized).mean(0)  # (L, h, w)
    names, groups = group_tokens(prompt, tokenize(prompt)[: length - 2], length)
    return Maps(image.cpu(), names, torch.stack([mean[group].sum(0) for group in groups]).cpu())


@contextmanager
def record_attention(layers: Sequence[CrossAttention], shares: list[Tensor]) -> Iterator[None]:
    """Append each layer's attention weights (B, heads, N, L) to `shares` while the block runs, results unchanged."""
    original = [layer.attend for layer in layers]
    for layer in layers:
        layer.attend = attention_recorder(layer.attend, shares)
    try:
        yield
    finally:
        for layer, attend in zip(layers, original, strict=True):
            layer.attend = attend


def attention_recorder(attend: AttentionFn, shares: list[Tensor]) -> AttentionFn:
    """Wrap an attention function so that it appends its weights to `shares`: its output for the identity as values."""

    def recording(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        identity = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], -1)
        shares.append(attend(q, k, identity, mask).float())
        return attend(q, k, v, mask)

    return recording


def resize_map(share: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize weights (N, L), at the N positions of a scaled-down latent, to maps (L, h, w) of the latent's shape."""
    positions, length = share.shape
    factor = round((shape[0] * shape[1] / positions) ** 0.5)
    height = -(-shape[0] // factor)
    maps = share.T.reshape(1, length, height, positions // height)
    return interpolate(maps, shape, mode="bilinear", align_corners=False)[0]


def group_tokens(prompt: str, pieces: Sequence[str], length: int) -> tuple[list[str], list[list[int]]]:
    """Group the tokens of a prompt by word; the start and end tokens are words of their own.

    pieces: text of the tokens between start and end, approximately as in the prompt.
    length: number of all tokens, at least two more.
    Returns the words and the token indices of each.
    """
    names, groups, end, low = ["(start)"], [[0]], 0, prompt.lower()
    for token, piece in enumerate(pieces, 1):
        text = piece.strip()
        start = low.find(text.lower(), end)
        inside_word = end > 0 and not low[end - 1].isspace() and low[end - 1].isalnum()
        joined = start == end and inside_word and text.isalnum()
        end = start + len(text) if start >= 0 else end
        if joined:
            names[-1] += text
            groups[-1].append(token)
        else:
            names.append(text)
            groups.append([token])
    rest = list(range(len(pieces) + 1, length))
    return [*names, "(end)"], [*groups, rest]


def _figure(result: Maps) -> Iterator[Tensor]:
    side = result.image.shape[-1]
    zoom = max(1, 96 // side)
    wide, gap, columns = zoom * side, 8, 5
    rows = -(-(len(result.words) + 1) // columns)
    figure = plotting.canvas(columns * (wide + gap) + gap, rows * (wide + 46) + 30)
    plotting.image(figure, result.image, gap, 24, zoom, "the image")
    for cell, (word, share) in enumerate(zip(result.words, result.maps, strict=True), 1):
        left, top = gap + cell % columns * (wide + gap), 24 + cell // columns * (wide + 46)
        axes = plotting.hide_axes(plotting.panel(figure, left, top, wide, wide, plotting.cut(word, 14)))
        axes.imshow(result.image.mean(0), cmap="Greys_r", vmin=-1, vmax=1, extent=(0, 1, 0, 1), aspect="auto")
        axes.imshow(share, cmap="cividis", alpha=0.75, extent=(0, 1, 0, 1), aspect="auto", interpolation="bilinear")
        text = f"{100 * float(share.min()):.0f} to {100 * float(share.max()):.0f}%"
        plotting.words(figure, text, left + wide / 2, top + wide + 4, plotting.SOFT, 11, ha="center")
    about = "share of attention at each position, from its minimum (dark) to its maximum (yellow)"
    plotting.words(figure, about, gap, rows * (wide + 46) + 12, plotting.SOFT, 11)
    yield plotting.frame(figure)
