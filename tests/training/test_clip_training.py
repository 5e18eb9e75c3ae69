"""training=clip: its files are read by the code that reads published ones, and it resumes where it stopped."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from smoke import command, here, process, train

from ldm.conditioner.clip import CLIP, build_clip
from ldm.conditioner.clip_image import CLIPImage
from ldm.io import atomic
from ldm.recipes.clip import split_groups
from ldm.training.clip import LitCLIP

MODEL = (
    "training.model.embed_dim=16",
    "training.model.vision_cfg={image_size: 16, layers: 1, width: 32, head_width: 32, patch_size: 8}",
    "training.model.text_cfg={context_length: 8, width: 32, heads: 2, layers: 1}",
)
SMALL = ("training=clip", "~training.score", "~training.sample_every", "metrics=none", *MODEL)


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("clip"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def made(place) -> Path:
    return train(*SMALL)


@pytest.mark.parametrize(("total", "sizes"), [(740, [100] * 7), (100, [100]), (60, [60]), (199, [100])])
def test_split_groups_covers_all_rows(total, sizes):
    found = split_groups(total, 100)
    assert [len(one) for one in found] == sizes
    assert len({row for one in found for row in one}) == sum(sizes)
    assert all(0 <= row < total for one in found for row in one)


def test_clip_files_load_like_published_ones(made):
    """Both towers, the text as a condition and the image as one, with no other code than a user's ViT-L/14 has."""
    model, weights = str(made / "model.json"), str(made / "weights.safetensors")
    encoder = CLIP(model, weights)
    context, mask, vector = encoder(["a photo of a ring", ""])
    assert (context.shape, vector.shape) == ((2, 8, 32), (2, 16))
    assert mask.all()
    assert encoder.identity != CLIP(model, random=True).identity
    net, _ = build_clip("model", weights, False, False)
    saved = atomic.read_tensors(made / "weights.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in net.state_dict().items())
    assert CLIPImage("model", weights)({"image": torch.zeros(2, 1, 32, 32)}).vector.shape == (2, 16)


def test_clip_retrieval_is_reported_with_chance(made):
    found = json.loads((made / "metrics.json").read_text())
    assert found["chance"] == 0.01
    assert 0 <= found["image_to_text"] <= 1
    assert 0 <= found["text_to_image"] <= 1


def test_trained_clip_conditions_diffusion_model(made):
    typed = (
        f"conditioner.encoder.model={made / 'model.json'}",
        f"conditioner.encoder.weights={made / 'weights.safetensors'}",
    )
    run = train("conditioner=clip", *typed, "conditioner.max_length=8", "metrics=none", "training.steps=1")
    assert command("sample.py", f"run={run}", "prompt=a ring", "num=2", "steps=2", "output_dir=drawn") == 0
    assert len(list(Path("drawn").glob("0*.png"))) == 2


def test_clip_checkpoint_contains_batch_norm_statistics():
    from ldm.checkpoint.state import extra_state

    def lit() -> LitCLIP:
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
        return LitCLIP(net, lambda texts: torch.zeros(len(texts), 1), torch.optim.SGD)

    one, other = lit(), lit()
    one.net(torch.randn(8, 3, 4, 4))
    for name, state in extra_state(one).items():
        other.get_submodule(name).set_extra_state(state)
    assert one.net[1].running_mean.abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(one.net.buffers(), other.net.buffers(), strict=True))


@pytest.mark.slow
def test_clip_training_resumes_exactly(place):
    """Steps 1 and 2 in two processes come to the weights of both in one, to the bit."""
    typed = (*SMALL, "training.steps=2", "training.save_every=1", "name=resumed")
    whole = train(*typed)
    (step,) = (whole / "checkpoints").glob("step-00000001")
    before = atomic.read_tensors(whole / "weights.safetensors")
    (whole / "metrics.json").unlink()
    (whole / "weights.safetensors").unlink()
    shutil.rmtree(whole / "checkpoints" / "step-00000002")
    done = process("train.py", "budget=smoke", *typed, cwd=place)
    assert done.returncode == 0, done.stderr
    after = atomic.read_tensors(whole / "weights.safetensors")
    assert step.is_dir()
    assert [name for name, value in before.items() if not torch.equal(value, after[name])] == []


@pytest.mark.parametrize("training", ["autoencoder", "classifier", "clip"])
def test_unconditional_training_rejects_degradation(training, capfd):
    capfd.readouterr()
    typed = ("~training.score", "degradation=mask", *(() if training == "autoencoder" else ("~training.sample_every",)))
    assert command("train.py", "budget=smoke", f"training={training}", *typed) == 2
    assert "degradation= is only for training=diffusion" in capfd.readouterr().err
