"""What `run=` names."""

import json
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import load
from ldm.checkpoint.adapters import BaseModelRef
from ldm.checkpoint.latent_space import JOINT, LatentSpace
from ldm.checkpoint.load import AdapterSource, ExternalSource, RunSource, open_adapter, open_model
from ldm.checkpoint.state import trainable_parameters
from ldm.config import build, serialize
from ldm.errors import UserError
from ldm.interop import config_nodes
from ldm.io import atomic
from ldm.runs.data_card import DataCard
from ldm.runs.folder import find_run
from ldm.tensors import hash_state_dict


def made(folder: Path, when: int) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.yaml", "data.json"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (when, when))
    return folder


def test_find_run_takes_newest_of_folder(tmp_path):
    made(tmp_path / "b", 100)
    new = made(tmp_path / "a", 200)
    (tmp_path / "no run").mkdir()
    assert find_run(tmp_path) == new


def test_find_run_accepts_run_and_its_parts(tmp_path):
    run = made(tmp_path / "runs" / "a", 100)
    made(tmp_path / "runs" / "b", 200)
    step = run / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    assert find_run(run) == find_run(step) == run


def test_find_run_reports_missing_run(tmp_path):
    with pytest.raises(UserError, match="nor a folder of runs"):
        find_run(tmp_path)


def test_open_model_chooses_by_kind(tmp_path):
    base, adapter, file = made(tmp_path / "base", 100), made(tmp_path / "adapter", 100), tmp_path / "a.safetensors"
    (adapter / "config.yaml").write_text("adapter: {rank: 4}")
    BaseModelRef(str(base), "0" * 64).write(adapter)
    file.touch()
    assert [type(open_model(path)) for path in (base, adapter, file)] == [RunSource, AdapterSource, ExternalSource]
    source = open_adapter(adapter)
    assert source.base.folder == base
    assert source.adapters == [source]
    assert not open_model(base).adapters
    with pytest.raises(UserError, match="is no adapter"):
        open_adapter(base)


def test_model_source_reads_config_and_data_card_once(tmp_path, monkeypatch):
    card = {"fingerprint": "", "classes": ["a"], "captions": [["a"]], "shape": [1, 32, 32]}
    run = made(tmp_path / "run", 100)
    (run / "data.json").write_text(json.dumps(card))
    reads, load_config = [], serialize.load_config
    monkeypatch.setattr(serialize, "load_config", lambda path: reads.append(path) or load_config(path))
    source = open_model(run / "data.json")
    assert source.data_card.shape == (1, 32, 32)
    (run / "data.json").unlink()
    assert (source.config, source.data_card.classes) == ({}, ["a"])
    assert reads == [run / "config.yaml"]


def test_latent_space_of_run_is_that_of_its_first_stage_unless_both_were_trained(tmp_path):
    space = LatentSpace("a" * 64, "f4c8")
    state = {"autoencoder.w": torch.ones(1), "denoiser.w": torch.zeros(1)}
    atomic.write_tensors(tmp_path / "first_stage.safetensors", {"w": torch.zeros(1)}, space.metadata)
    assert RunSource(tmp_path, tmp_path, {}).latent_space == "f4c8-aaaaaaaaaaaa"
    atomic.write_tensors(tmp_path / "weights.safetensors", state, space.metadata)
    assert RunSource(tmp_path, tmp_path, {}).latent_space == "f4c8-aaaaaaaaaaaa"
    atomic.write_tensors(tmp_path / "weights.safetensors", state, space.metadata | JOINT)
    trained = hash_state_dict({"autoencoder.w": torch.ones(1)})
    assert RunSource(tmp_path, tmp_path, {}).latent_space == f"f4c8-{trained[:12]}"


def test_run_loads_first_stage_from_its_weights_if_both_were_trained(tmp_path):
    config = OmegaConf.create(
        {
            "net": config_nodes.unet(16, (1,), 1, (), config_nodes.transformer(conv=True), heads=2, groups=8),
            "autoencoder": config_nodes.first_stage(4, 16, (1, 2), 1, groups=8),
            "conditioner": config_nodes.label(1, 8),
            "schedule": config_nodes.cosine(10),
            "prediction": config_nodes.prediction("Eps"),
            "seed": 0,
        }
    )
    card = DataCard("", (3, 32, 32), ["a"], [["a"]])
    autoencoder = build.build_autoencoder(config.autoencoder, card.shape[0])
    space = LatentSpace.from_autoencoder(autoencoder, build.to_container(config.autoencoder))
    model = build.build_model(config, autoencoder, card)
    atomic.write_tensors(tmp_path / "first_stage.safetensors", autoencoder.state_dict(), space.metadata)
    card.write(tmp_path)
    for metadata in (space.metadata, space.metadata | JOINT):
        if JOINT.items() <= metadata.items():
            model.unfreeze_first_stage()
        state = {name: torch.full_like(p, 0.5) for name, p in trainable_parameters(model).items()}
        atomic.write_tensors(tmp_path / "weights.safetensors", state, metadata)
        loaded = RunSource(tmp_path, tmp_path, config).load()
        expected = model.cpu().state_dict() | state
        assert all(torch.equal(value.cpu(), expected[name]) for name, value in loaded.state_dict().items())
        assert not any(p.requires_grad for p in loaded.autoencoder.parameters())


def test_model_is_loaded_to_gpu_if_there_is_one(monkeypatch):
    for available, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert load._default_device() == device
