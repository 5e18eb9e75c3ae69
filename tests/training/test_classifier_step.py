"""The step of the classifier of noisy latents recomputed by hand, with a network that is linear in x_t and in time."""

from functools import partial

import pytest
import torch
from recomputed import TOLERANCE, Adam, StepRecorder, recompute, warm_cosine
from torch import Tensor, nn

from ldm.autoencoder.kl import AutoencoderKL
from ldm.diffusion.schedule import linear
from ldm.diffusion.times import discrete, independent, stratified
from ldm.tensors import KeyedNoise
from ldm.training.callbacks import LearningRate
from ldm.training.classifier import LitClassifier
from ldm.training.fit import fit
from ldm.training.lr import cosine
from ldm.training.optimizers import adamw

T, CLASSES, BATCH, STEPS, SEED, WARMUP, END = 100, 3, 4, 4, 11, 1, 0.2
OPTIONS = {"lr": 2e-3, "betas": (0.8, 0.9), "weight_decay": 0.3}
SHIFT, SCALE = (0.2, -0.4), (1.5, 0.7)


class Latents:
    """Six posteriors over latents (2, 3, 2), with a class each."""

    moments = torch.randn(6, 4, 3, 2, generator=torch.Generator().manual_seed(2))
    label = torch.tensor([0, 2, 1, 1, 0, 2])

    def __len__(self):
        return len(self.label)

    def batch(self, at):
        epoch, index = zip(*at, strict=True)
        rows = list(index)
        return {"moments": self.moments[rows], "label": self.label[rows], "epoch": list(epoch), "index": rows}


class Linear(nn.Module):
    """Logits x W + time v / T + b, with x as a vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.time = nn.Linear(12, CLASSES), nn.Linear(1, CLASSES, bias=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.image(x.flatten(1)) + self.time(time[:, None] / T)


def times_by_hand(way: str, rows: list[tuple[int, int]], positions: list[int]) -> Tensor:
    """Index 0 ... T - 1 of each row's time: T u rounded down, u uniform, or in the stratum of the row's position."""
    u = KeyedNoise(SEED, rows).uniform("t", torch.empty(len(rows)))
    if way == "stratified":
        u = (torch.tensor(positions) + u) / BATCH
    return (u * T).long()


@pytest.mark.parametrize("precision", ["64", "32"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("way", ["independent", "stratified"])
def test_classifier_steps_equal_formulas(way, parts, precision):
    """Cross-entropy -log softmax(logits)[label] of x_t = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps."""
    autoencoder = AutoencoderKL(nn.Identity(), nn.Identity(), 2, 1)
    shift, scale = (torch.tensor(value)[:, None, None] for value in (SHIFT, SCALE))
    autoencoder.shift.copy_(shift.flatten())
    autoencoder.scale.copy_(scale.flatten())
    times = partial({"independent": independent, "stratified": stratified}[way], density=discrete)
    lit = LitClassifier(Linear(), autoencoder, linear(T), times, partial(adamw, **OPTIONS), SEED)
    recorder, schedule = StepRecorder(), partial(cosine, warmup=WARMUP, end=END)
    options = {"batch_size": BATCH, "steps": STEPS, "accelerator": "cpu", "accumulate_grad_batches": parts}
    fit(lit, Latents(), [LearningRate(schedule, STEPS), recorder], precision=precision, **options)

    # Ho et al. 2020, eq. 4, betas of T = 1000 scaled to T
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T).cumprod(0)
    coefficients = [part.sqrt() for part in (alpha_bar, 1 - alpha_bar)]
    batches = 0

    def compute(p: dict[str, Tensor], rows: list[tuple[int, int]]):
        nonlocal batches
        size, first = len(rows), batches % parts * len(rows)
        batches += 1
        noise, index = KeyedNoise(SEED, rows), [i for _, i in rows]
        mean, logvar = Latents.moments[index].double().chunk(2, 1)
        draws = [noise.normal(purpose, mean.float()).double() for purpose in ("posterior", "eps")]
        z = (mean + torch.exp(logvar / 2) * draws[0] - shift.double()) * scale.double()
        t = times_by_hand(way, rows, list(range(first, first + size)))
        signal, sigma = (part[t][:, None] for part in coefficients)
        x = signal * z.flatten(1) + sigma * draws[1].flatten(1)
        time = t.double()[:, None] / T
        logits = x @ p["net.image.weight"].T + p["net.image.bias"] + time @ p["net.time.weight"].T
        label = torch.eye(CLASSES).double()[Latents.label[index]]
        share = logits.exp() / logits.exp().sum(1, keepdim=True)
        terms = {
            "loss": -(share * label).sum(1).log().mean(),
            "accuracy": (share.argmax(1) == Latents.label[index]).double().mean(),
        }
        slope = (share - label) / size
        gradients = {"image.weight": slope.T @ x, "image.bias": slope.sum(0), "time.weight": slope.T @ time}
        return terms, {f"net.{name}": value for name, value in gradients.items()}

    adams = {
        name: Adam(**OPTIONS | ({"weight_decay": 0.0} if value.ndim < 2 else {}))
        for name, value in recorder.start.items()
    }
    worst = recompute(recorder, compute, adams, lambda step: warm_cosine(step, STEPS, WARMUP, END), parts)
    assert max(worst.values()) < TOLERANCE[precision], worst
    assert autoencoder.shift.tolist() == pytest.approx(SHIFT)
    assert len(recorder.steps) == STEPS
