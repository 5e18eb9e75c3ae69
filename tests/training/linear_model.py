"""A latent diffusion model that is linear in its weights, its data, and both in plain tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from formulas import draw
from torch import Tensor, nn

from ldm.autoencoder.kl import AutoencoderKL
from ldm.conditioner.compose import Compose
from ldm.conditioner.label import Label, LabelVector
from ldm.conditioner.text import Text
from ldm.conditioner.tokens import TextFeatures
from ldm.diffusion.denoiser import Denoiser
from ldm.model import LatentDiffusion

CLASSES, CONTEXT, VECTOR, CHANNELS, SIDE = 4, 3, 4, 2, 2
SHIFT, SCALE, SEED = (0.25, -0.5), (1.5, 0.75), 5
CAPTIONS = ("red fish", "a blue bird on a tree", "bird", "", "one red tree", "fish on a blue tree")
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
DROP, STYLE_DROP = 0.4, 0.5
NET, CONDITIONER = "model.denoiser.net.", "model.conditioner."


class LinearNet(nn.Module):
    """out = mix x + read (mean context) + lift vector + clock time / 1000 + strength (guidance scale)."""

    def __init__(self, outputs: int = CHANNELS, context: int = CONTEXT, vector: int = 0, guided: bool = False):
        super().__init__()
        self.mix, self.read = nn.Linear(CHANNELS, outputs), nn.Linear(context, outputs, bias=False)
        self.lift = nn.Linear(vector, outputs, bias=False) if vector else None
        self.clock = nn.Parameter(torch.zeros(outputs))
        self.strength = nn.Parameter(torch.zeros(outputs)) if guided else None

    def forward(self, x, time, cond):
        mask = torch.ones(cond.context.shape[:2]) if cond.mask is None else cond.mask
        mask = mask.to(cond.context)[..., None]
        shift = self.read((cond.context * mask).sum(1) / mask.sum(1)) + time[:, None] / 1000 * self.clock
        if self.lift is not None:
            shift = shift + self.lift(cond.vector)
        if self.strength is not None:
            shift = shift + cond.scale[:, None] * self.strength
        return (self.mix(x.flatten(2).mT) + shift[:, None]).mT.unflatten(2, x.shape[2:])


def word_vector(word: str) -> Tensor:
    i = WORDS.index(word)
    return torch.tensor([(i + 1) / 4, (-1.0) ** i, 1 / 2 ** (i % 3)])


def end_vector() -> Tensor:
    return torch.tensor([0.5, 0.25, -1.0])


def text_vector(text: str) -> Tensor:
    """Return signs of the text's length, whose norm is the root of their number."""
    return torch.tensor([1.0 if len(text) >> bit & 1 else -1.0 for bit in range(VECTOR)])


class Words:
    """A text encoder: a fixed vector for each word, one for the end, and signs times 3 for the text."""

    context_dim, vector_dim, length, identity = CONTEXT, VECTOR, 16, "words"

    def __call__(self, texts, length=None):
        context = torch.stack([*map(word_vector, texts[0].split()), end_vector()])[None]
        return TextFeatures(context, torch.ones(context.shape[:2], dtype=torch.bool), 3 * text_vector(texts[0])[None])

    def to(self, device):
        return self


class Rows:
    """Six samples with moments, image, relief, label and caption; label -1 is none."""

    labels, captions = (0, 3, -1, 1, 2, 0), CAPTIONS

    def __init__(self, *leave_out: str):
        generator = torch.Generator().manual_seed(3)
        self.leave_out = leave_out
        self.values = {
            "moments": torch.randn(6, 2 * CHANNELS, SIDE, SIDE, generator=generator),
            "image": torch.randn(6, 3, 4, 4, generator=generator),
            "relief": torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1,
            "label": torch.tensor(self.labels),
        }

    def __len__(self):
        return 6

    def batch(self, samples):
        epoch, index = map(list, zip(*samples, strict=True))
        values = {name: value[index] for name, value in self.values.items() if name not in self.leave_out}
        return {**values, "caption": [self.captions[i] for i in index], "epoch": epoch, "index": index}


def encoder() -> nn.Module:
    """Return a first stage's encoder: images (B, 3, 4, 4) -> moments (B, 4, 2, 2), one matrix for each patch."""
    return nn.Conv2d(3, 2 * CHANNELS, 2, stride=2)


def make_conditioner(kind: str) -> nn.Module:
    if kind == "text":
        return Text(Words(), max_length=16)
    if kind == "both":
        return Compose({"style": STYLE_DROP}, kind=Label(CLASSES, CONTEXT), style=LabelVector(CLASSES, VECTOR))
    return Label(CLASSES, CONTEXT)


def make_model(
    denoising: Callable[[nn.Module], Denoiser],
    kind: str = "label",
    seed: int = 0,
    net: nn.Module | None = None,
    **options,
) -> LatentDiffusion:
    """Build the model with random weights: denoising(net) is its denoiser."""
    net = net or LinearNet(vector=0 if kind == "label" else VECTOR, **options)
    autoencoder = AutoencoderKL(encoder(), nn.Identity(), CHANNELS, 2)
    model = LatentDiffusion(autoencoder, make_conditioner(kind), denoising(net), (4, 4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
        autoencoder.shift.copy_(torch.tensor(SHIFT))
        autoencoder.scale.copy_(torch.tensor(SCALE))
    return model


def double_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return all weights of a module in float64."""
    return {name: p.detach().clone().double() for name, p in module.named_parameters()}


def latent(weights: dict[str, Tensor], batch: dict[str, Any]) -> Tensor:
    """Return (mean + std * noise - shift) * scale, the sample of the posterior of moments or of an image."""
    moments = batch.get("moments")
    if moments is None:
        kernel, bias = (weights[f"model.autoencoder.encoder.{name}"] for name in ("weight", "bias"))
        patches = batch["image"].unflatten(3, (SIDE, 2)).unflatten(2, (SIDE, 2))  # (B, 3, h, 2, w, 2)
        moments = torch.einsum("bchiwj,ocij->bohw", patches, kernel) + bias[:, None, None]
    mean, log_variance = moments[:, :CHANNELS], moments[:, CHANNELS:]
    noise = draw(torch.randn, SEED, "posterior", batch["rows"], mean.shape[1:])
    shift, scale = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (SHIFT, SCALE))
    return (mean + (log_variance / 2).exp() * noise - shift) * scale


@dataclass
class Inputs:
    """A condition in plain tensors: mean context (B, D), vector (B, V), scale (B,); the tables' rows that they are.

    tables: name of a table of embeddings -> (field, row (B,)).
    """

    context: Tensor
    vector: Tensor | None = None
    scale: Tensor | None = None
    tables: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


def label_rows(batch: dict[str, Any], dropped: Tensor) -> Tensor:
    """Return the row of each sample's class, the last one for none."""
    return torch.where(dropped | (batch["label"] < 0), CLASSES, batch["label"])


def condition(
    kind: str,
    weights: dict[str, Tensor],
    batch: dict[str, Any],
    drop: float,
    prefix: str = CONDITIONER,
    training: bool = True,
) -> Inputs:
    """Return the condition of each row, the null condition where a uniform number is below `drop`.

    training: whether the dropouts of Compose's parts are active.
    """
    dropped = draw(torch.rand, SEED, "drop", batch["rows"]) < drop
    if kind == "text":
        captions = ["" if row else caption for caption, row in zip(batch["caption"], dropped, strict=True)]
        contexts = [torch.stack([*map(word_vector, text.split()), end_vector()]).double().mean(0) for text in captions]
        return Inputs(torch.stack(contexts), torch.stack([text_vector(text).double() for text in captions]))
    rows = label_rows(batch, dropped)
    if kind == "label":
        name = f"{prefix}embedding.weight"
        return Inputs(weights[name][rows], tables={name: ("context", rows)})
    names = [f"{prefix}conditioners.{part}.embedding.weight" for part in ("kind", "style")]
    styles = label_rows(batch, dropped | (draw(torch.rand, SEED, "drop/style", batch["rows"]) < STYLE_DROP * training))
    tables = dict(zip(names, (("context", rows), ("vector", styles)), strict=True))
    return Inputs(weights[names[0]][rows], weights[names[1]][styles], tables=tables)


def output(weights: dict[str, Tensor], x: Tensor, time: Tensor, cond: Inputs, prefix: str = NET) -> Tensor:
    """Return LinearNet's output (B, outputs, h, w)."""
    w = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    shift = w["mix.bias"] + cond.context @ w["read.weight"].T + time[:, None] / 1000 * w["clock"]
    if "lift.weight" in w:
        shift = shift + cond.vector @ w["lift.weight"].T
    if "strength" in w:
        shift = shift + cond.scale[:, None] * w["strength"]
    return torch.einsum("oc,bchw->bohw", w["mix.weight"], x) + shift[:, :, None, None]


def gradients(
    weights: dict[str, Tensor], x: Tensor, time: Tensor, cond: Inputs, slope: Tensor, mixed: Tensor | float = 0.0
) -> dict[str, Tensor]:
    """Return the loss's gradient by every weight of the network and of the tables.

    slope: the loss's derivative by the output (B, outputs, h, w).  mixed: more of it by mix's output.
    """
    by_sample = slope.sum((2, 3))  # (B, outputs)
    result = {
        "mix.weight": torch.einsum("bohw,bchw->oc", slope + mixed, x),
        "mix.bias": (slope + mixed).sum((0, 2, 3)),
        "read.weight": by_sample.T @ cond.context,
        "clock": (by_sample * time[:, None] / 1000).sum(0),
    }
    if cond.vector is not None:
        result["lift.weight"] = by_sample.T @ cond.vector
    if cond.scale is not None:
        result["strength"] = (by_sample * cond.scale[:, None]).sum(0)
    result = {NET + name: value for name, value in result.items()}
    slopes = {"context": by_sample @ weights[NET + "read.weight"]}
    if cond.vector is not None:
        slopes["vector"] = by_sample @ weights[NET + "lift.weight"]
    for name, (part, rows) in cond.tables.items():
        result[name] = torch.zeros_like(weights[name]).index_add(0, rows, slopes[part])
    return result
