"""The step of CLIP recomputed by hand: two linear towers, whose every gradient is a formula.

Unit vectors u = a / |a|, v = b / |b| of an image's a = x A and a text's b = (mean of its tokens' rows of B);
logits s u v^T, s = exp(logit_scale).
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from recomputed import TOLERANCE, Adam, StepRecorder, recompute, warm_cosine
from torch import Tensor, nn

from ldm.tensors import KeyedNoise
from ldm.training.callbacks import LearningRate
from ldm.training.clip import LitCLIP, random_crop
from ldm.training.fit import fit
from ldm.training.lr import cosine
from ldm.training.optimizers import adamw

SIDE, DIM, LENGTH, WORDS, STEPS, SEED, WARMUP, END = 4, 3, 2, 6, 4, 9, 1, 0.3
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.2}
MEAN, STD = (0.4, 0.5, 0.3), (0.6, 0.8, 0.7)
CAPTIONS = ("0 1", "2 3", "4 5", "0 1", "1 3", "5 5")  # two are equal


class Captioned:
    """Six images (3, SIDE, SIDE) with a caption each."""

    image = torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(7)).tanh()

    def __len__(self):
        return len(CAPTIONS)

    def batch(self, at):
        epoch, index = zip(*at, strict=True)
        rows = list(index)
        return {"image": self.image[rows], "caption": self.captions(at), "epoch": list(epoch), "index": rows}

    def captions(self, at):
        return [CAPTIONS[index] for _, index in at]


class Reversing(Captioned):
    """Every image has its own caption in the first two epochs, its neighbour's afterwards."""

    def captions(self, at):
        words = [(index + (epoch > 1)) % len(self) for epoch, index in at]
        return [f"{word} {word}" for word in words]


def tokenize(captions) -> Tensor:
    return torch.tensor([[int(word) for word in caption.split()] for caption in captions])


class Towers(nn.Module):
    """As open_clip's model: (images, ids) -> unit vectors of both, and the factor of their cosines."""

    visual = SimpleNamespace(image_size=SIDE, image_mean=MEAN, image_std=STD)

    def __init__(self, logit_scale: float):
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Linear(3 * SIDE * SIDE, DIM, bias=False)
        self.text = nn.Embedding(WORDS, DIM)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = self.image(image.flatten(1).to(self.image.weight.dtype))
        vectors = [nn.functional.normalize(x, dim=1) for x in (image, self.text(ids).mean(1))]
        return vectors[0], vectors[1], self.logit_scale.exp()


def by_direction(vector: Tensor, by_unit: Tensor) -> Tensor:
    """The gradient by a vector of a function of its direction."""
    norm = vector.norm(dim=1, keepdim=True)
    unit = vector / norm
    return (by_unit - unit * (unit * by_unit).sum(1, keepdim=True)) / norm


def formulas(
    p: dict[str, Tensor], rows: list[tuple[int, int]], data: Captioned, crop: float = 1.0
) -> tuple[dict, dict]:
    """Radford et al. 2021, fig. 3: the mean of the cross-entropies of rows and columns, equal captions sharing."""
    index, size, captions = [i for _, i in rows], len(rows), data.captions(rows)
    image = random_crop(data.image[index].double(), KeyedNoise(SEED, rows), crop)
    mean, std = (torch.tensor(part, dtype=torch.float64)[:, None, None] for part in (MEAN, STD))
    x = (((image + 1) / 2 - mean) / std).flatten(1)
    ids = tokenize(captions)
    counts = torch.stack([(ids == word).double().mean(1) for word in range(WORDS)], 1)
    a, b = x @ p["net.image.weight"].T, counts @ p["net.text.weight"]
    u, v = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
    scale, cosines = p["net.logit_scale"].exp(), u @ v.T
    weights = (scale * cosines).exp()
    by_row, by_column = weights / weights.sum(1, keepdim=True), weights / weights.sum(0)
    same = torch.tensor([[a == b for b in captions] for a in captions]).double()
    right = same / same.sum(1, keepdim=True)  # symmetric, because equality is
    terms = {
        "loss": -(right * (by_row.log() + by_column.log())).sum() / (2 * size),
        "accuracy": same[range(size), cosines.argmax(1)].mean(),
        "scale": scale,
    }
    slope = (by_row + by_column - 2 * right) / (2 * size)
    gradients = {
        "image.weight": by_direction(a, scale * slope @ v).T @ x,
        "text.weight": counts.T @ by_direction(b, scale * slope.T @ u),
        "logit_scale": scale * (slope * cosines).sum(),
    }
    return terms, {f"net.{name}": value for name, value in gradients.items()}


@pytest.mark.parametrize("precision", ["64", "32"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("crop", [1.0, 0.6])
def test_clip_steps_equal_formulas(crop, parts, precision):
    _, worst = trained(Towers(math.log(4.0)), Captioned(), STEPS, crop, parts, precision)
    assert max(worst.values()) < TOLERANCE[precision], worst


def test_clip_scale_is_clipped_and_falls_again():
    """Right pairs push it to its largest value, 100 (Radford et al. 2021, sec. 2.5); wrong ones pull it back."""
    towers, angle = Towers(math.log(99.9)), 0.1 * torch.arange(6.0)
    directions = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    x = (Captioned.image / 2 + 0.5 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        towers.image.weight.copy_((torch.linalg.pinv(x.flatten(1)) @ directions).T)
        towers.text.weight.copy_(directions)
    recorder, worst = trained(towers, Reversing(), 6, 1.0, 1, "64")
    assert max(worst.values()) < TOLERANCE["64"], worst
    scales = [float(step.weights["net.logit_scale"].exp()) for step in recorder.steps]
    assert scales[:2] == pytest.approx([100, 100], rel=1e-6)
    assert scales[-1] < 99.9


def trained(
    towers: Towers, data: Captioned, steps: int, crop: float, parts: int, precision: str
) -> tuple[StepRecorder, dict[str, float]]:
    """Train on all rows per step, and recompute every step: the record and the largest distances."""
    lit = LitCLIP(towers, tokenize, partial(adamw, **OPTIONS), crop, SEED)
    recorder, schedule = StepRecorder(), partial(cosine, warmup=WARMUP, end=END)
    options = {"batch_size": len(data), "steps": steps, "accelerator": "cpu", "accumulate_grad_batches": parts}
    fit(lit, data, [LearningRate(schedule, steps), recorder], precision=precision, **options)
    adams = {
        name: Adam(**OPTIONS | ({"weight_decay": 0.0} if value.ndim < 2 else {}))
        for name, value in recorder.start.items()
    }
    compute, limits = partial(formulas, data=data, crop=crop), {"net.logit_scale": math.log(100)}
    return recorder, recompute(
        recorder, compute, adams, lambda step: warm_cosine(step, steps, WARMUP, END), parts, limits
    )
