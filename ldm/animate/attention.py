"""Where the words of a prompt act: cross-attention over the image."""

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
    """image (C, H, W) in [-1, 1]; words, L of them; maps (L, h, w): at each place the share of attention each has, in all 1."""

    image: Tensor
    words: Sequence[str]
    maps: Tensor


def attention(
    run: str,  # a run folder, or a folder of runs: the newest; the model must be told text
    prompt: str,  # any text
    steps: int = 20,  # of DDIM
    scale: float = 3.0,  # of the guidance
    seed: int = 0,  # the image's
) -> Animation:
    """An image and, for each word of its prompt, where the network attended to it: the mean over steps, layers and heads.

    At each place the shares of all words, and of the marks of start and end, are 1 in all (cf. Tang et al. 2022, DAAM).
    """
    arguments.require_at_least(1, steps=steps)
    model = arguments.model_of(run)
    return Animation(_figure(maps(model, prompt, grids.trailing(model.denoiser.schedule, steps), scale, seed)), 1)


@torch.inference_mode()
def maps(model: LatentDiffusion, prompt: str, ts: Tensor, scale: float, seed: int = 0) -> Maps:
    """The Maps of one prompt drawn on the grid. Raises UserError for a model that attends to no words."""
    places = [module for module in model.denoiser.net.modules() if isinstance(module, CrossAttention)]
    tokens = getattr(model.conditioner, "tokenize", None)
    if not places or tokens is None:
        raise UserError(
            "this model attends to no words: attention needs a network with cross-attention and a text conditioner"
        )
    told = {"index": [0], "caption": [prompt]}
    height, width = model.latent_shape(1)[-2:]
    shares: list[Tensor] = []
    with record_attention(places, shares):
        image = tasks.sample(model, told, [seed], ts, ddim, partial(cfg, scale=scale))[0]
    read = model.condition(told).mask
    length = shares[0].shape[-1] if read is None else int(read.sum())
    mean = torch.stack([resize_map(share[0, :, :, :length].mean(0), (height, width)) for share in shares]).mean(
        0
    )  # (L, h, w)
    names, groups = group_tokens(prompt, tokens(prompt)[: length - 2], length)
    return Maps(image.cpu(), names, torch.stack([mean[group].sum(0) for group in groups]).cpu())


@contextmanager
def record_attention(places: Sequence[CrossAttention], shares: list[Tensor]) -> Iterator[None]:
    """Within the block each place's attention appends its weights (B, heads, N, L) to `shares`; what it computes is the same."""
    kept = [place.attend for place in places]
    for place in places:
        place.attend = attention_recorders(place.attend, shares)
    try:
        yield
    finally:
        for place, attend in zip(places, kept, strict=True):
            place.attend = attend


def attention_recorders(attend: AttentionFn, shares: list[Tensor]) -> AttentionFn:
    """The same attention, its weights appended to `shares`: they are what it makes of the identity as values."""

    def tell(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        each = torch.eye(k.shape[-2], dtype=v.dtype, device=v.device).expand(*k.shape[:-1], -1)
        shares.append(attend(q, k, each, mask).float())
        return attend(q, k, v, mask)

    return tell


def resize_map(share: Tensor, shape: tuple[int, int]) -> Tensor:
    """Weights (N, L) of the places of one resolution, as maps (L, h, w) of the latent's shape, which they are a scaled copy of."""
    places, length = share.shape
    factor = round((shape[0] * shape[1] / places) ** 0.5)
    height = -(-shape[0] // factor)
    maps = share.T.reshape(1, length, height, places // height)
    return interpolate(maps, shape, mode="bilinear", align_corners=False)[0]


def group_tokens(prompt: str, pieces: Sequence[str], length: int) -> tuple[list[str], list[list[int]]]:
    """Words of a prompt and, for each, the tokens it was cut into; the marks of start and end are words of their own.

    pieces: the tokens between the marks, as they stand in the prompt, or nearly.  length: of all tokens, at least two more.
    """
    names, groups, at, low = ["(start)"], [[0]], 0, prompt.lower()
    for place, piece in enumerate(pieces, 1):
        found = low.find(piece.strip().lower(), at)
        joined = (
            found == at and at > 0 and not low[at - 1].isspace() and piece.strip().isalnum() and low[at - 1].isalnum()
        )
        at = found + len(piece.strip()) if found >= 0 else at
        if joined:
            names[-1] += piece.strip()
            groups[-1].append(place)
        else:
            names.append(piece.strip())
            groups.append([place])
    rest = list(range(len(pieces) + 1, length))
    return [*names, "(end)"], [*groups, rest]


def _figure(found: Maps) -> Iterator[Tensor]:
    side = found.image.shape[-1]
    zoom = max(1, 96 // side)
    wide, gap, columns = zoom * side, 8, 5
    rows = -(-(len(found.words) + 1) // columns)
    figure = plotting.canvas(columns * (wide + gap) + gap, rows * (wide + 46) + 30)
    plotting.image(figure, found.image, gap, 24, zoom, "the image")
    for place, (word, share) in enumerate(zip(found.words, found.maps, strict=True), 1):
        left, top = gap + place % columns * (wide + gap), 24 + place // columns * (wide + 46)
        axes = plotting.hide_axes(plotting.panel(figure, left, top, wide, wide, plotting.cut(word, 14)))
        axes.imshow(found.image.mean(0), cmap="Greys_r", vmin=-1, vmax=1, extent=(0, 1, 0, 1), aspect="auto")
        axes.imshow(share, cmap="cividis", alpha=0.75, extent=(0, 1, 0, 1), aspect="auto", interpolation="bilinear")
        text = f"{100 * float(share.min()):.0f} to {100 * float(share.max()):.0f}%"
        plotting.words(figure, text, left + wide / 2, top + wide + 4, plotting.SOFT, 11, ha="center")
    about = "share of each place's attention, from its least (dark) to its most (yellow)"
    plotting.words(figure, about, gap, rows * (wide + 46) + 12, plotting.SOFT, 11)
    yield plotting.frame(figure)
