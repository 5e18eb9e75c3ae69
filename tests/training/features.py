"""REPA on a linear model: a linear image encoder, and the alignment in plain tensors."""

from dataclasses import replace

import linear_model as linear
import torch
from objectives_by_hand import Result, Setting, denoising
from torch import Tensor, nn

from ldm.diffusion.repa import REPA

FEATURES, HIDDEN, WEIGHT = 3, 4, 0.6
PROJECT, ENCODER = "objective.project.", "objective.encoder.map."
RESIZE = torch.tensor([[3.0, 3, 1, 0], [0, 1, 3, 3]], dtype=torch.float64) / 7  # triangle filter of width 2, 4 -> 2


class Pixels(nn.Module):
    """An image encoder with one linear map at every pixel."""

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, FEATURES, 1)

    def features(self, image):
        return [image, self.map(image)]


def make_repa(objective: nn.Module) -> REPA:
    torch.manual_seed(2)
    return REPA(objective, Pixels(), "mix", 1, linear.CHANNELS, FEATURES, HIDDEN, WEIGHT)


def silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x sigmoid(x) and its derivative."""
    s = 1 / (1 + (-x).exp())
    return x * s, s * (1 + x * (1 - s))


def alignment(s: Setting, weights, batch, z, cond) -> Result:
    """Yu et al. 2025, section 3: minus WEIGHT times the mean cosine of projected features and the encoder's."""
    result = denoising(s, weights, batch, z, cond)
    x = result.x
    features = torch.einsum("oc,bchw->bhwo", weights[f"{ENCODER}weight"][..., 0, 0], batch["image"])
    features = features + weights[f"{ENCODER}bias"]
    target = torch.einsum("ih,jw,bhwf->bijf", RESIZE, RESIZE, features).flatten(0, 2)
    mix, bias = (weights[f"{linear.NET}mix.{name}"] for name in ("weight", "bias"))
    hidden = (torch.einsum("oc,bchw->bhwo", mix, x) + bias).flatten(0, 2)  # (B h w, C)
    w, b = ([weights[f"{PROJECT}{layer}.{kind}"] for layer in (0, 2, 4)] for kind in ("weight", "bias"))
    a0 = hidden @ w[0].T + b[0]
    h0, d0 = silu(a0)
    a1 = h0 @ w[1].T + b[1]
    h1, d1 = silu(a1)
    p = h1 @ w[2].T + b[2]
    size, unit = p.norm(dim=1, keepdim=True), target / target.norm(dim=1, keepdim=True)
    cosine = (p * unit).sum(1, keepdim=True) / size
    by_p = -WEIGHT / len(p) * (unit - cosine * p / size) / size
    by_a1 = by_p @ w[2] * d1
    by_a0 = by_a1 @ w[1] * d0
    others = {}
    for layer, slope, inputs in ((0, by_a0, hidden), (2, by_a1, h0), (4, by_p, h1)):
        others |= {f"{PROJECT}{layer}.weight": slope.T @ inputs, f"{PROJECT}{layer}.bias": slope.sum(0)}
    similarity = cosine.reshape(len(x), -1).mean(1)
    terms = {**result.terms, "loss": result.terms["loss"] - WEIGHT * similarity, "similarity": similarity}
    mixed = (by_a0 @ w[0]).reshape(len(x), *x.shape[2:], -1).movedim(-1, 1)
    return replace(result, terms=terms, others=others, mixed=mixed)
