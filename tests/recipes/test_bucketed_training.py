"""python train.py data=buckets data.path=DIR: a model of images of many shapes, one shape a batch."""

import json

import pytest
import torch
from PIL import Image
from smoke import command, composed, here, train

from ldm.checkpoint.step import load_checkpoint
from ldm.config import build
from ldm.io import atomic
from ldm.runs import metrics_log
from ldm.training import diffusion

TYPED = (
    "data=buckets",
    "data.path=images",
    "data.size=32",
    "metrics=none",
    "conditioner=label",
    "training.batch_size=4",
)


@pytest.fixture
def place(tmp_path):
    """A working folder with a folder of twelve images of three shapes, in two classes."""
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise([(40, 70), (60, 60), (90, 50)][i % 3], 60).save(path)
    with here(tmp_path):
        yield tmp_path


@pytest.mark.slow
def test_bucketed_training_samples_any_shape(place, capfd, monkeypatch):
    seen = []
    step = diffusion.LitDiffusion.training_step
    monkeypatch.setattr(
        diffusion.LitDiffusion,
        "training_step",
        lambda self, batch, i: (seen.append(batch["moments"].shape[2:]), step(self, batch, i))[1],
    )
    run = train(*TYPED, "training.steps=6")
    assert "shapes      40x24, 32x32, 24x40 (height x width)" in capfd.readouterr().out
    assert set(seen[-6:]) > {torch.Size([8, 8])}, "batches of several shapes, of a first stage of factor 4"
    assert torch.isfinite(
        torch.tensor(
            [row["train/loss"] for row in metrics_log.read_metrics_log(run / "metrics.jsonl") if "train/loss" in row]
        )
    ).all()
    assert json.loads((run / "data.json").read_text())["shape"][1:] == [32, 32]
    assert command("sample.py", f"run={run}", "num=2", "steps=2", "size=[24,40]", "label=a", "output_dir=drawn") == 0
    assert Image.open("drawn/000000.png").size == (40, 24)


@pytest.mark.slow
def test_bucketed_training_resumes_to_same_weights(place):
    whole = train(*TYPED, "training.steps=6", "training.save_every=3", "name=whole", "keep_every=3")
    half = load_checkpoint(whole / "checkpoints" / "step-00000003")
    assert half.step == 3
    step = whole / "checkpoints" / "step-00000003"
    again = train(*TYPED, "training.steps=6", "training.save_every=3", "name=again", f"resume={step}")
    ends = [atomic.read_tensors(run / "weights.safetensors") for run in (whole, again)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("typed", "divisor"),
    [
        ((), 8),
        (("net=dit_s2",), 8),
        (("autoencoder=identity",), 2),
        (("net=smoke_guidance_embed", "autoencoder=kl_f8_small"), 16),
    ],
)
def test_image_size_multiple_combines_autoencoder_and_net(typed, divisor):
    assert build.image_size_multiple(composed("budget=smoke", *typed)) == divisor
