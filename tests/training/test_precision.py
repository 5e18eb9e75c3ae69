"""Training in float16 with a scaled loss, in bfloat16 and in float32: steps, skipped steps, resuming, and losses."""

from pathlib import Path

import pytest
import torch
from rows import Line, Rows, Seen, train
from tiny_diffusion import Losses, make_lit, make_unet
from tiny_diffusion import train as train_diffusion
from torch import nn

from ldm.checkpoint.step import load_checkpoint
from ldm.data.stream import BatchStream
from ldm.ema import ConstantEMA, PowerEMA
from ldm.training.callbacks import EMACallback, LearningRate, MetricsRecorder
from ldm.training.checkpoints import CheckpointCallback, CheckpointRestorer
from ldm.training.gradients import GradientGuard

STEPS = 6
KEYS = [part.samples for part in BatchStream(16, 4, STEPS)]
SCALE = 2.0**16  # GradScaler's at the start


class Steep(Line):
    """A line whose loss is multiplied by `slope`, trained by an optimizer that may unscale gradients itself."""

    def __init__(self, bad=(), slope=1.0, fused=True, clip=None, sgd=False):
        super().__init__(bad)
        self.slope, self.fused, self.clip, self.sgd = slope, fused, clip, sgd

    def training_step(self, batch, batch_idx):
        terms = super().training_step(batch, batch_idx)
        return {name: self.slope * term for name, term in terms.items()}

    def on_before_optimizer_step(self, optimizer):
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters(), self.clip)

    def configure_optimizers(self):
        if self.sgd:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=self.fused)


class Scales(Seen):
    """Records the loss scale after each step, and the trainer, too."""

    def __init__(self):
        super().__init__()
        self.scales = []

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, lit, outputs, batch, batch_idx)
        self.trainer = trainer
        self.scales.append(trainer.precision_plugin.state_dict().get("scale"))


@pytest.mark.parametrize("fused", [False, True])
def test_float16_norms_and_clipping_do_not_depend_on_scale(tmp_path, fused):
    """A clipped step of SGD moves by the rate times `clip`; norms are those of float32, to the roundings of float16."""
    runs = {}
    for precision in ("32", "fp16"):
        guard, seen, norms = GradientGuard(tmp_path, 1), Seen(), []
        record = MetricsRecorder(lambda step, values, n=norms: n.append(values["train/grad_norm"]), 1, STEPS, guard)
        train(Steep(fused=fused, clip=0.05, sgd=True), Rows(), [guard, record, seen], steps=STEPS, precision=precision)
        runs[precision] = norms, seen.weights
    assert runs["fp16"][0] == pytest.approx(runs["32"][0], rel=8 * 2**-11)
    assert runs["fp16"][1] == pytest.approx(runs["32"][1], rel=8 * 2**-11)
    assert min(runs["32"][0]) > 0.05  # every step was clipped


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("precision", ["32", "bf16", "fp16"])
def test_skipped_step_leaves_everything_as_it_was(tmp_path, precision, fused, accumulate):
    """Weights, moments, their count and the averages stay; the scale is halved; the rate goes by the step."""
    lit, guard, seen, rates = Steep([KEYS[2][1]], fused=fused), GradientGuard(tmp_path, 3), Scales(), []
    averages = [ConstantEMA(lit.line, 0.5, warmup=True), PowerEMA(lit.line, 0.1)]
    start = float(lit.line.weight.detach())

    class Rates(Seen):
        def on_train_batch_end(self, trainer, *rest):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    callbacks = [LearningRate(lambda step, total: 1 - step / total, STEPS), guard]
    callbacks += [*(EMACallback(average, guard) for average in averages), seen, Rates()]
    train(lit, Rows(), callbacks, steps=STEPS, precision=precision, accumulate_grad_batches=accumulate)
    assert seen.weights[2] == seen.weights[1]
    assert len(set(seen.weights)) == STEPS - 1
    (optimizer,) = seen.trainer.optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS - 1}
    taken = [weight for step, weight in enumerate(seen.weights) if step != 2]
    for average in averages:
        expected = start
        for update, weight in enumerate(taken, 1):
            expected = average.decay_at(update) * expected + (1 - average.decay_at(update)) * weight
        assert average.updates == STEPS - 1
        assert float(average.shadow["weight"]) == pytest.approx(expected, rel=2**-20)
    assert seen.scales == ([SCALE] * 2 + [SCALE / 2] * 4 if precision == "fp16" else [None] * STEPS)
    assert rates == pytest.approx([0.1 * (1 - step / STEPS) for step in range(STEPS)])


def test_average_of_other_optimizer_is_updated_when_one_skips():
    guard, a, b = GradientGuard(Path(), 3), nn.Linear(1, 1), nn.Linear(1, 1)
    guard.on_train_batch_start(None, a, {}, 0)
    for module, value in ((a, float("inf")), (b, 1.0)):
        for p in module.parameters():
            p.grad = torch.full_like(p, value)
        guard.on_before_optimizer_step(None, nn.ModuleList([a, b]), torch.optim.SGD(module.parameters(), lr=1.0))
    assert guard.skipped
    assert (guard.has_skipped(a), guard.has_skipped(b)) == (True, False)
    guard.on_train_batch_start(None, a, {}, 0)
    assert not guard.has_skipped(a)


def test_overflowing_gradients_lower_scale_until_they_fit(tmp_path):
    """The gradient of 64 (w x - 1)^2 at the first scale is above float16's largest number, 65504."""
    guard, seen, lit = GradientGuard(tmp_path, 10), Scales(), Steep(slope=64.0)
    start = float(lit.line.weight.detach())
    average = PowerEMA(lit.line, 0.1)
    train(lit, Rows(), [guard, EMACallback(average, guard), seen], steps=12, precision="fp16")
    skipped = sum(weight == start for weight in seen.weights)
    assert 0 < skipped < 10
    assert average.updates == 12 - skipped
    assert seen.scales == [SCALE / 2 ** min(step, skipped) for step in range(1, 13)]
    assert len(set(seen.weights)) == 12 - skipped + 1


@pytest.mark.parametrize("average", [PowerEMA, ConstantEMA])
def test_float16_run_resumes_exactly_after_skipped_step(tmp_path, average):
    """Weights, moments, average, its number of updates and the loss scale are those of the run that went on."""

    def run(folder, steps, resume=None):
        lit, guard, seen = Steep([KEYS[2][1]]), GradientGuard(tmp_path, 3), Scales()
        ema = average(lit.line)
        restoring = [CheckpointRestorer(resume, ema)] if resume else []
        saving = CheckpointCallback(tmp_path / folder, ema, 4, STEPS, "")
        start = resume.step if resume else 0
        callbacks = [*restoring, guard, EMACallback(ema, guard), seen, saving]
        train(lit, Rows(), callbacks, steps=steps, start=start, precision="fp16")
        moments = [value for state in seen.trainer.optimizers[0].state.values() for value in state.values()]
        return [*lit.line.parameters(), *ema.shadow.values(), *moments], ema.updates, seen.trainer

    run("a", 4)
    resumed, updates, trainer = run("a", STEPS, load_checkpoint(tmp_path / "a" / "step-00000004"))
    whole, expected, reference = run("b", STEPS)
    assert updates == expected == STEPS - 1
    assert all(torch.equal(one, two) for one, two in zip(resumed, whole, strict=True))
    assert trainer.precision_plugin.state_dict() == reference.precision_plugin.state_dict()
    assert trainer.precision_plugin.state_dict()["scale"] == SCALE / 2


# Largest relative differences from float64 of a single loss, and of the mean of 20 in a row, over 200 steps.
BOUNDS = {"32": (2**-10, 2**-13), "bf16": (2**-2, 2**-4), "fp16": (2**-3, 2**-5)}  # roundings of 2^-24, 2^-8, 2^-11


@pytest.mark.slow
def test_losses_of_precisions_agree_over_200_steps():
    losses = {}
    for precision in ("64", *BOUNDS):
        seen = Losses()
        train_diffusion(make_lit(make_unet()), [seen], 200, precision=precision)
        losses[precision] = torch.tensor(seen.losses, dtype=torch.float64)
    exact = losses.pop("64")
    assert exact[-20:].mean() < 0.6 * exact[:20].mean()  # it learns
    for precision, bounds in BOUNDS.items():
        for width, bound in zip((1, 20), bounds, strict=True):
            low, high = (values.unfold(0, width, 1).mean(1) for values in (losses[precision], exact))
            off = float(((low - high).abs() / high).max())
            assert off < bound, (precision, width, off)
    assert len({tuple(one.tolist()) for one in losses.values()}) == len(BOUNDS)  # each was trained as it says
