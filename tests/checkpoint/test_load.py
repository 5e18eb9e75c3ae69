"""What `run=` names."""

import json
import os
from pathlib import Path

import pytest

from ldm.checkpoint.adapters import BaseModelRef
from ldm.checkpoint.load import AdapterSource, ExternalSource, RunSource, open_adapter, open_model
from ldm.config import serialize
from ldm.errors import UserError
from ldm.runs.folder import find_run


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
