"""One call of fit under each strategy: the same weights, averages, scores and pictures."""

import lightning as L
import pytest
import torch
from rows import Line, Rows, train

from ldm.ema import PowerEMA
from ldm.errors import ConfigError
from ldm.training.callbacks import EMACallback, EvaluationCallback, SampleGridCallback
from ldm.training.fit import check_device, device_type
from ldm.training.sharded import shard


class Sharded(Line):
    """A line that FSDP can shard."""

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard((self.line,), self.device_mesh["data_parallel"])


class Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def outcome(lit, accumulate=1, steps=6, **options):
    """What a training leaves: losses, weight, average, and at every second step the average as scores and as pictures
    show it.
    """
    ema, scores, pictures, losses = PowerEMA(lit.line, 0.1), {}, {}, Losses()

    def shown():
        assert not lit.line.training
        return float(lit.line.weight.detach()), float(lit.line(torch.ones(1, 1)).detach())

    def measure():
        return dict(zip(("weight", "output"), shown(), strict=True))

    around = [
        EMACallback(ema),
        losses,
        EvaluationCallback(measure, lambda step, values: scores.update({step: list(values.values())}), 2, ema),
        SampleGridCallback(lambda step: pictures.update({step: list(shown())}), 2, ema),
    ]
    train(lit, Rows(), around, steps=steps, accumulate_grad_batches=accumulate, **options)
    assert ema.module is lit.line
    return {
        "losses": losses.losses,
        "weight": float(lit.line.weight.detach()),
        "average": float(ema.shadow["weight"]),
        **{f"score {step}": value for step, value in scores.items()},
        **{f"picture {step}": value for step, value in pictures.items()},
    }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sharded_fit_matches_unsharded(accumulate, alone):
    expected = outcome(Sharded(), accumulate)
    assert len({tuple(expected[f"score {step}"]) for step in (2, 4, 6)}) == 3
    found = outcome(Sharded(), accumulate, strategy="fsdp")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
@pytest.mark.parametrize("name", ["32", "bf16"])
def test_auto_is_the_precision_that_it_resolves_to(name, strategy, alone, monkeypatch):
    """Wherever the hardware multiplies bf16 fast, or does not."""
    expected = outcome(Sharded(), strategy=strategy, precision=name)
    monkeypatch.setattr("ldm.compat.has_fast_bfloat16", lambda: name == "bf16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert outcome(Sharded(), strategy=strategy, precision="auto") == expected
    other = outcome(Sharded(), strategy=strategy, precision={"32": "bf16", "bf16": "32"}[name])
    assert other["losses"] != expected["losses"]


def test_fsdp_of_unsupported_module_falls_back_with_message(alone, capfd):
    expected = outcome(Line())
    capfd.readouterr()
    assert outcome(Line(), strategy="fsdp") == expected
    said = [line for line in capfd.readouterr().out.splitlines() if line]
    assert said == ["trainer     strategy=fsdp shards diffusion models alone; Line is trained with strategy=auto"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "gpu"}, "accelerator=gpu: expected a GPU, and this machine has none"),
        ({"precision": "fp16", "strategy": "fsdp"}, "precision=fp16: expected 32 or bf16 with strategy=fsdp"),
        ({"precision": "64", "strategy": "fsdp"}, "precision=64: expected 32 or bf16 with strategy=fsdp"),
        ({"precision": 64, "strategy": "fsdp"}, "precision=64: expected 32 or bf16 with strategy=fsdp"),
    ],
)
def test_fit_refuses_what_device_or_strategy_lacks(options, message, alone, monkeypatch):
    """In one line, before any compute."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        train(Sharded(), Rows(), [], steps=1, **options)


@pytest.mark.parametrize(("cuda", "mps"), [(True, False), (False, True)])
def test_check_device_takes_either_kind_of_gpu(cuda, mps, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    check_device("gpu", "auto", "32")


@pytest.mark.parametrize(
    ("accelerator", "cuda", "mps", "expected"),
    [
        ("auto", True, False, "cuda"),
        ("gpu", False, True, "mps"),
        ("auto", False, False, "cpu"),
        ("cpu", True, True, "cpu"),
    ],
)
def test_device_type_is_the_device_that_lightning_chooses(accelerator, cuda, mps, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    assert device_type(accelerator) == expected
