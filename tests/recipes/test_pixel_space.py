"""autoencoder=identity: diffusion in pixels, with nothing to train before it and nothing to load beside it."""

import json

import pytest
import torch
from smoke import command, here, train

from ldm.checkpoint.load import load_model
from ldm.cli.errors import run_guarded
from ldm.report import __main__, bits


@pytest.fixture
def folder(smoke, tmp_path):
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        yield tmp_path


@pytest.mark.slow
def test_pixel_space_trains_and_samples_without_first_stage(smoke, folder):
    kept = sorted((smoke.folder / "cache" / "first_stage").iterdir())
    run = train("autoencoder=identity", "metrics=none")
    assert sorted((smoke.folder / "cache" / "first_stage").iterdir()) == kept
    model = load_model(run)
    assert model.latent_shape(2) == (2, 1, 32, 32)
    image = torch.rand(1, 1, 32, 32) * 2 - 1
    assert torch.equal(model.encode(image), image)
    assert command("sample.py", f"run={run}", "num=2", "steps=2", "output_dir=drawn") == 0
    assert len(list((folder / "drawn").rglob("*.png"))) >= 2
    assert run_guarded(lambda: __main__.main(["bits", str(run), "num=6", "steps=20"])) == 0
    found = json.loads((run / "bits.json").read_text())
    assert {name: found[name] for name in ("of", "variance", "steps", "n")} == {
        "of": "pixels",
        "variance": "small",
        "steps": 20,
        "n": 6,
    }
    assert 0 <= found["prior"] < found["low"] <= found["bits_per_dim"] <= found["high"]
    assert bits.of_run(str(run), 6, 20, "small", 4)["bits_per_dim"] == pytest.approx(
        found["bits_per_dim"], rel=1e-5
    )  # of any batch
    assert run_guarded(lambda: __main__.main(["bits", str(run), "variance=learned"])) == 2


def test_pixel_space_autoencoder_cannot_be_trained(folder, capsys):
    assert (
        command(
            "train.py",
            "budget=smoke",
            "training=autoencoder",
            "~training.score",
            "autoencoder=identity",
            "metrics=none",
        )
        == 2
    )
    assert "Identity has no weights to train" in capsys.readouterr().err


def test_metric_network_may_not_be_training_network(folder, capsys, monkeypatch):
    from ldm.autoencoder import loss

    monkeypatch.setattr(loss.ReconstructionLoss, "__init__", shares_its_network(loss.ReconstructionLoss.__init__))
    assert command("train.py", "budget=smoke", "training=autoencoder", "~training.score", "training.seed=5") == 2
    assert "fashion is in the training loss and cannot measure" in capsys.readouterr().err


def shares_its_network(build):
    def init(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.perceptual = torch.nn.Identity()
        self.perceptual.name = "fashion"

    return init
