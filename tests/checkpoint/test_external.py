"""How a model that train.py did not write is found, described and loaded, up to the converters of its weights."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoint import external
from ldm.errors import UserError
from ldm.interop.pipeline import Pipeline


def test_pipeline_is_folder_or_file(tmp_path, monkeypatch):
    pipelines = [Pipeline({"seed": n}, {}, {}, {}, {}, {}) for n in range(2)]
    monkeypatch.setattr(external.folder, "load", lambda path: pipelines[0])
    monkeypatch.setattr(external, "open_single_file", lambda path, kind, yaml: pipelines[1])
    assert external.open_pipeline(tmp_path) is pipelines[0]
    assert external.open_pipeline(tmp_path / "model.ckpt") is pipelines[1]


def test_checkpoint_file_takes_named_yaml_else_that_beside_it(tmp_path, monkeypatch):
    """The image's size is that of the latent in the yaml, 64 by default, times the first stage's factor."""
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(1)}, file)
    monkeypatch.setattr(external.compvis_config, "from_compvis", lambda yaml: {"autoencoder": {"factor": 8}})
    monkeypatch.setattr(external.checkpoint, "load", lambda state, config, size, kind: size)
    with pytest.raises(UserError, match=r"put its yaml beside it as model\.yaml"):
        external.open_single_file(file, "ema", None)
    (tmp_path / "model.yaml").write_text("model: {params: {image_size: 32}}")
    (tmp_path / "other.yaml").write_text("model: {params: {}}")
    assert external.open_single_file(file, "ema", None) == 256
    assert external.open_single_file(file, "ema", tmp_path / "other.yaml") == 512
    with pytest.raises(UserError, match=r"config=.*gone\.yaml: no such file"):
        external.open_single_file(file, "ema", tmp_path / "gone.yaml")


@pytest.mark.parametrize("text", ["[model]", "model: 3", "model: {}", "model: [params]"])
def test_yaml_without_model_params_is_rejected(tmp_path, text):
    file = tmp_path / "model.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"has no model\.params"):
        external.read_compvis_yaml(file)


def test_pipeline_info_is_read_again_when_any_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(external, "_describe", lambda path, kind, changed: {time // 10**9 for time in changed})
    names = ("model.pt", "model.yaml", f"{external.dit_file.STAGE}/a/config.json", f"{external.dit_file.STAGE}/vae.pt")
    for time, name in enumerate((*names, "other.pt"), 1):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    assert external.pipeline_info(tmp_path / "model.pt") == {1, 2, 4}  # the stage's own files, none below them
    assert external.pipeline_info(tmp_path) == {1, 2, 3, 4, 5}


@pytest.mark.parametrize(("layer", "needed"), [(-1, 4), (-2, 3), (-3, 2)])
def test_text_tower_needs_layers_up_to_the_one_that_is_read(layer, needed):
    def tower(layers):
        made = nn.Module()
        made.transformer = nn.Module()
        made.transformer.resblocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(layers))
        return made

    def load(layers):
        encoder = {"_target_": "ldm.conditioner.clip.CLIP", "layer": layer}
        config = {"conditioner": {"_target_": "ldm.conditioner.text.TextTokensOnly", "encoder": encoder}}
        text = tower(layers).state_dict()
        external.load_text_tower(whole, Pipeline(config, {}, {}, {}, text, {}))
        return text

    whole = tower(4)
    text = load(needed)
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in text.items())
    with pytest.raises(UserError, match=rf"text tower: 2 weights are missing, .*resblocks\.{needed - 1}\."):
        load(needed - 1)
