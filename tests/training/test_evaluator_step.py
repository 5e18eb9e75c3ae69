"""The step of the evaluator recomputed by hand, with a network that is linear in the image's 256 levels."""

from functools import partial

import pytest
import torch
from recomputed import TOLERANCE, Adam, StepRecorder, recompute, warm_cosine
from torch import Tensor, nn

from ldm.metrics.judge import FashionNet
from ldm.training.callbacks import LearningRate
from ldm.training.evaluator import LitEvaluator
from ldm.training.fit import fit
from ldm.training.lr import cosine

CLASSES, SIDE, SMOOTHING, STEPS, WARMUP, END = 3, 4, 0.15, 4, 1, 0.0
OPTIONS = {"lr": 2e-3, "betas": (0.9, 0.99), "weight_decay": 0.2}


class Images:
    """Six images (1, SIDE, SIDE) with values beyond [-1, 1], with a class each."""

    image = 1.2 * torch.randn(6, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(4))
    label = torch.tensor([1, 0, 2, 2, 1, 0])

    def __len__(self):
        return len(self.label)

    def batch(self, at):
        epoch, index = zip(*at, strict=True)
        rows = list(index)
        return {"image": self.image[rows], "label": self.label[rows], "epoch": list(epoch), "index": rows}


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(SIDE * SIDE, CLASSES)

    def logits(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return self.head(images.flatten(1).to(self.head.weight.dtype) / 255)


@pytest.mark.parametrize("precision", ["64", "32"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_evaluator_steps_equal_formulas(smoothing, parts, precision):
    """Cross-entropy against (1 - s) of the label and s / classes of each class (Szegedy et al. 2016, sec. 7)."""
    lit = LitEvaluator(Linear(), partial(torch.optim.AdamW, **OPTIONS, fused=True), smoothing)
    recorder, schedule = StepRecorder(), partial(cosine, warmup=WARMUP, end=END)
    options = {"batch_size": 4, "steps": STEPS, "accelerator": "cpu", "accumulate_grad_batches": parts}
    fit(lit, Images(), [LearningRate(schedule, STEPS), recorder], precision=precision, **options)

    def compute(p: dict[str, Tensor], rows: list[tuple[int, int]]):
        index = [i for _, i in rows]
        levels = ((Images.image[index].double().clip(-1, 1) / 2 + 0.5) * 255 + 0.5).floor()
        x = levels.flatten(1) / 255
        logits = x @ p["net.head.weight"].T + p["net.head.bias"]
        share = logits.exp() / logits.exp().sum(1, keepdim=True)
        target = (1 - smoothing) * torch.eye(CLASSES).double()[Images.label[index]] + smoothing / CLASSES
        terms = {
            "loss": -(share.log() * target).sum(1).mean(),
            "accuracy": (logits.argmax(1) == Images.label[index]).double().mean(),
        }
        slope = (share - target) / len(rows)
        return terms, {"net.head.weight": slope.T @ x, "net.head.bias": slope.sum(0)}

    adams = {name: Adam(**OPTIONS) for name in recorder.start}
    worst = recompute(recorder, compute, adams, lambda step: warm_cosine(step, STEPS, WARMUP, END), parts)
    assert max(worst.values()) < TOLERANCE[precision], worst


def test_evaluator_network_trains_in_float64():
    """trainer.precision=64: the network of conf/training/evaluator.yaml takes one step, and its loss is float64."""

    class Grey(Images):
        image = Images.image.repeat(1, 1, 8, 8)

    recorder = StepRecorder()
    lit = LitEvaluator(FashionNet(4, 8, CLASSES), partial(torch.optim.AdamW, lr=1e-3))
    fit(lit, Grey(), [recorder], batch_size=4, steps=1, accelerator="cpu", precision="64")
    assert recorder.steps[0].terms["loss"].dtype == torch.float64
