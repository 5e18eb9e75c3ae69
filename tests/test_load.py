"""What `run=` names."""

import os
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.runs.folder import find_run


def made(folder: Path, when: int) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.yaml", "data.json"):
        (folder / name).write_text("{}")
        os.utime(folder / name, (when, when))
    return folder


def test_a_folder_of_runs_is_its_newest(tmp_path):
    made(tmp_path / "b", 100)
    new = made(tmp_path / "a", 200)
    (tmp_path / "no run").mkdir()
    assert find_run(tmp_path) == new


def test_a_run_and_what_lies_in_it_is_the_run(tmp_path):
    run = made(tmp_path / "runs" / "a", 100)
    made(tmp_path / "runs" / "b", 200)
    step = run / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    assert find_run(run) == find_run(step) == run


def test_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="nor a folder of runs"):
        find_run(tmp_path)
