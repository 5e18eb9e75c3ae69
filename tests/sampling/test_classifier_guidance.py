"""The noisy classifier trained, found again and used as guidance; trainings begun from the weights of another."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line_error, read_pngs, run_sample
from smoke import here, train

from ldm.io import atomic

SMALL = (
    "~training.score",
    "~training.sample_every",
    "training.net.channels=16",
    "training.net.num_head_channels=16",
    "metrics=none",
)


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("classifier"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def classifier(place):
    return train("training=classifier", *SMALL, "training.num=50")


def drawn(run: Path, *overrides: str) -> torch.Tensor:
    return read_pngs(run_sample(f"run={run}", "steps=3", "num=4", *overrides, output_dir="out"))


def test_classifier_metrics_are_per_noise_level(classifier):
    found = json.loads((classifier / "metrics.json").read_text())
    levels = [value for name, value in found.items() if name.startswith("accuracy/t=")]
    assert len(levels) == 5
    assert found["accuracy"] == pytest.approx(sum(levels) / 5)


def test_classifier_guidance_changes_sample_and_is_reproducible(classifier, smoke, capfd):
    guided = [
        f"guidance=classifier guidance.classifier={classifier} guidance.scale={scale}".split() for scale in (0, 30)
    ]
    none, much = (drawn(smoke.run, "label=ring", *typed) for typed in guided)
    plain = drawn(smoke.run, "label=ring", "guidance=cfg", "guidance.scale=1.0")
    assert (none - plain).abs().max() <= 1
    assert not torch.equal(much, none)
    assert torch.equal(drawn(smoke.run, "label=ring", *guided[1]), much)
    assert_one_line_error(
        capfd,
        "that run trained no classifier",
        "sample.py",
        f"run={smoke.run}",
        "guidance=classifier",
        f"guidance.classifier={smoke.run}",
    )
    assert_one_line_error(
        capfd,
        "nowhere: no such folder",
        "sample.py",
        f"run={smoke.run}",
        "guidance=classifier",
        "guidance.classifier=nowhere",
    )


def test_classifier_of_other_schedule_or_latent_space_is_refused(classifier, smoke, lively, place, capfd):
    other = place / "other"
    shutil.copytree(classifier, other)
    config = (other / "config.yaml").read_text()
    assert "s: 0.008" in config
    (other / "config.yaml").write_text(config.replace("s: 0.008", "s: 0.01"))
    typed = ("num=1", "steps=2", "guidance=classifier")
    assert_one_line_error(
        capfd,
        "was trained on another noise schedule",
        "sample.py",
        f"run={smoke.run}",
        *typed,
        f"guidance.classifier={other}",
    )
    assert_one_line_error(
        capfd, "belongs to autoencoder f4", "sample.py", f"run={lively}", *typed, f"guidance.classifier={classifier}"
    )


@pytest.mark.slow
def test_init_loads_weights_of_another_run(smoke):
    typed = ("training.steps=1", "training.optimizer.lr=0", "training.ema.sigma_rel=0.2", "metrics=none")
    made = train(f"init={smoke.run}", "data.seed=3", *typed)
    before, after = (atomic.read_tensors(run / "weights.safetensors") for run in (smoke.run, made))
    fresh = atomic.read_tensors(train("data.seed=3", *typed) / "weights.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], fresh[name]) for name in before)
    assert (made / "first_stage.safetensors").is_file()


def test_init_zeroes_weights_of_new_condition(smoke):
    typed = ("training.steps=1", "training.optimizer.lr=0", "metrics=none", "degradation=bicubic_x4")
    made = train(f"init={smoke.run}", "conditioner=[label,low_res]", *typed)
    before, after = (atomic.read_tensors(run / "weights.safetensors") for run in (smoke.run, made))
    stem = "denoiser.net.stem.weight"
    channels = before[stem].shape[1]
    assert torch.equal(after[stem][:, :channels], before[stem])
    assert after[stem].shape[1] == channels + 2
    assert not after[stem][:, channels:].any()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("net.channels=32", "is of another architecture: denoiser.net."),
        ("autoencoder.z_channels=5", "has a first stage of another architecture"),
        ("init=nowhere", "nowhere: no such folder"),
    ],
)
def test_init_rejects_weights_of_another_architecture(typed, said, smoke, capfd):
    own = (typed,) if typed.startswith("init=") else (f"init={smoke.run}", typed)
    assert_one_line_error(capfd, said, "train.py", "budget=smoke", *own, "metrics=none")
