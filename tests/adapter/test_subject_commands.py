"""A subject learned by textual inversion and by DreamBooth, by the commands, on a run conditioned on text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import read_pngs, run_sample
from smoke import enliven, here, train
from towers import conditioner_overrides, write_towers

from ldm.io import atomic
from ldm.runs.metrics_log import read_metrics_log

FEW = ("num=2", "steps=2", "guidance.scale=1", "seed=5")
STEP = (
    *("metrics=none", "training.steps=1", "training.batch_size=8", "training.lr_schedule.warmup=1"),
    *("training.optimizer.lr=0.01", "training.sample_every=500", "training.cond_drop_prob=0"),
)


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("subject"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def clip(place) -> tuple[str, ...]:
    """What is typed for a small CLIP."""
    files = conditioner_overrides("clip", write_towers(place / "towers"))
    return ("conditioner=clip", "conditioner.max_length=16", *files)


@pytest.fixture(scope="module")
def base(clip) -> Path:
    """A run conditioned on text by a small CLIP, its weights drawn at random."""
    run = train(*clip, "metrics=none", "training.sample_every=500")
    enliven(run)
    return run


def draw(run: Path, prompt: str, *overrides: str, out: str = "drawn") -> Path:
    return run_sample(f"run={run}", f"prompt={prompt}", *FEW, *overrides, output_dir=out)


@pytest.mark.slow
def test_textual_inversion_command_trains_one_token(base):
    """The token's vectors alone learn; only prompts that contain it change, and at scale 0 none does."""
    run = train("adapter=textual_inversion", "adapter.placeholder_token=photo", f"init={base}", *STEP)
    state = atomic.read_tensors(run / "weights.safetensors")
    assert {name: value.shape[1] for name, value in state.items()} == {"vectors": 32}
    assert json.loads((run / "base.json").read_text())["path"] == str(base)
    before, after = (read_pngs(draw(folder, "a photo of a disc")) for folder in (base, run))
    assert ((before - after).abs().amax((1, 2)) > 1).all()
    assert torch.equal(read_pngs(draw(base, "one ring")), read_pngs(draw(run, "one ring")))
    off = draw(base, "a photo of a disc", f"adapters=[{{run: {run}, scale: 0}}]")
    assert torch.equal(read_pngs(off), before)


@pytest.mark.slow
def test_dreambooth_command_adds_prior_loss_and_samples(base, clip, place):
    """On one batch, noise and weights the loss is linear in the weight of the prior; the result is a complete model."""
    for name, prompt in (("prior", "a disc"), ("subject", "one ring")):
        folder = draw(base, prompt, "num=6", "save=all", out=f"images/{name}")
        for file in folder.iterdir():
            if not file.name.startswith("0"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    loss, runs = {}, []
    for index, weight in ((0, 0), (0, 1), (0, 3), (1, 0)):
        choice = (f"objective.prior={index}", f"objective.weight={weight}")
        data = ("data=folder", f"data.path={place / 'images'}", "data.test_fraction=0")
        runs.append(train(f"init={base}", *clip, "objective=dreambooth", *choice, *data, *STEP))
        (row,) = [row for row in read_metrics_log(runs[-1] / "metrics.jsonl") if "train/loss" in row]
        loss[index, weight] = row["train/loss"]
    prior = loss[0, 1] - loss[0, 0]
    assert prior > 0
    assert loss[0, 3] - loss[0, 0] == pytest.approx(3 * prior, rel=1e-4)
    assert loss[1, 0] == pytest.approx(prior, rel=1e-4)  # with the folders exchanged the other mean alone
    assert not (runs[1] / "base.json").exists()
    assert (read_pngs(draw(runs[1], "one subject")) - read_pngs(draw(base, "one subject"))).abs().max() > 1
