"""Where a run begins: what `resume` takes, passes over, sets aside and refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.checkpoint.step import load_checkpoint, save_checkpoint
from ldm.config import serialize
from ldm.errors import UserError
from ldm.io import atomic
from ldm.recipes.resume import final_metrics, find_resume_checkpoint
from ldm.runs import metrics_log
from ldm.runs.folder import lock_run

CONFIG = {
    "seed": 0,
    "net": {"width": 8},
    "data": {"path": "here"},
    "training": {"batch_size": 4, "optimizer": {"lr": 1e-3}, "log_every": 1},
}


def run(folder: Path, config: dict, *steps: int) -> Path:
    """A run folder with checkpoints of these steps."""
    serialize.save_config(config, folder / "config.yaml")
    for step in steps:
        text = (folder / "config.yaml").read_text()
        save_checkpoint(folder / "checkpoints", step, {"model": {"w": torch.full((3,), float(step))}}, {}, text, keep=0)
    return folder


def resumed(folder: Path, wanted: str | None, config: dict = CONFIG, **more) -> int | None:
    found = find_resume_checkpoint({**config, "resume": wanted, **more}, folder, chief=True)
    return found and found.step


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("wanted", ["auto", "must", None])
def test_resume_takes_newest_valid_checkpoint(wanted, tmp_path, capfd):
    folder = run(tmp_path / "run", CONFIG, 2, 4)
    assert resumed(folder, wanted) == 4
    (folder / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"")
    assert resumed(folder, wanted) == 2
    said = capfd.readouterr()
    assert "step-00000004: " in said.err
    assert "has 0 bytes" in said.err
    assert "resuming from step 2 (" in said.out


def test_resume_clears_stale_temporaries(tmp_path):
    folder = run(tmp_path / "run", CONFIG, 2, 4)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    (folder / "checkpoints" / "step-00000004").rename(folder / "checkpoints" / f".step-00000004.{dead}.old.tmp")
    for place in ("", "checkpoints", "averages"):
        half = folder / place / f".weights.safetensors.{dead}.tmp"
        half.mkdir(parents=True)
        (half / ".tmpX").write_bytes(b"half")
    assert resumed(folder, "auto") == 4  # which gets its name back
    assert not list(folder.rglob(".*.tmp"))


def test_resume_without_valid_checkpoint(tmp_path):
    folder = run(tmp_path / "run", CONFIG, 2)
    durable_file = folder / "checkpoints" / "step-00000002" / "model.safetensors"
    durable_file.write_bytes(durable_file.read_bytes()[:-1] + b"x")
    assert resumed(folder, "auto") is None
    with pytest.raises(
        UserError, match=r"resume=must: no valid checkpoint in .*run/checkpoints; resume=auto starts from step 0"
    ):
        resumed(folder, "must")


def test_resume_must_names_differences_to_nearest_run(tmp_path):
    run(tmp_path / "far", {**CONFIG, "seed": 3, "net": {"width": 9}, "data": {"path": "there"}}, 2)
    run(tmp_path / "near", {**CONFIG, "data": {"path": "there"}}, 2)
    run(tmp_path / "new", CONFIG)
    with pytest.raises(UserError, match=r"; near has, and differs from this config in data.path: there -> here$"):
        resumed(tmp_path / "new", "must")


def test_resume_never_sets_aside_existing_files(tmp_path):
    folder = run(tmp_path / "run", CONFIG, 2)
    metrics_log.write_final_metrics(folder, {"fd": 1.0})
    assert final_metrics({"resume": "auto"}, folder) == {"fd": 1.0}
    assert final_metrics({"resume": "never"}, folder) is None
    with lock_run(folder):
        assert resumed(folder, "never") is None
        assert names(folder / "before-1") == ["checkpoints", "config.yaml", "metrics.json"]
        run(folder, CONFIG, 3)
        assert resumed(folder, "never") is None
    assert names(folder) == [".lock", "before-1", "before-2"] or names(folder) == ["before-1", "before-2"]
    assert load_checkpoint(folder / "before-2" / "checkpoints" / "step-00000003").step == 3


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step-00000004"])
def test_resume_from_path(place, tmp_path):
    other = run(tmp_path / "other", CONFIG, 2, 4)
    new = run(tmp_path / "new", CONFIG)
    assert resumed(new, str(other / place)) == 4
    run(new, CONFIG, 6)  # the same command again, after its own checkpoint
    assert resumed(new, str(other / place)) == 6


@pytest.mark.parametrize(("step", "begins"), [(3, 2), (4, 2), (5, 4), (9, 6)])
def test_resume_for_debug_step_takes_checkpoint_before_it(step, begins, tmp_path):
    other = run(tmp_path / "other", CONFIG, 2, 4, 6)
    assert resumed(run(tmp_path / "new", CONFIG), str(other), debug={"step": step}) == begins


def test_resume_for_debug_step_before_all_checkpoints_is_refused(tmp_path):
    other = run(tmp_path / "other", CONFIG, 2)
    with pytest.raises(
        UserError, match="none of its valid checkpoints is before step 2; without resume= it begins with the first"
    ):
        resumed(run(tmp_path / "new", CONFIG), str(other), debug={"step": 2})


def test_resume_from_earlier_checkpoint_of_same_run_sets_aside_later_ones(tmp_path):
    folder = run(tmp_path / "run", CONFIG, 2, 4, 6)
    assert resumed(folder, str(folder / "checkpoints" / "step-00000004")) == 4
    assert names(folder / "checkpoints") == ["step-00000002", "step-00000004"]
    assert names(folder / "before-1") == ["step-00000006"]
    assert resumed(folder, "auto") == 4


CHANGES = {
    "net.width: 8 -> 9": {"net": {"width": 9}},
    "data.path: here -> there": {"data": {"path": "there"}},
    "training.batch_size: 4 -> 8": {"training": {**CONFIG["training"], "batch_size": 8}},
    "training.optimizer.lr: 0.001 -> 0.002": {"training": {**CONFIG["training"], "optimizer": {"lr": 2e-3}}},
    "seed: 0 -> 1": {"seed": 1},
}


@pytest.mark.parametrize("said", CHANGES)
def test_resume_from_other_training_is_refused_unless_keys_are_named(said, tmp_path):
    other, new = run(tmp_path / "other", CONFIG, 2), run(tmp_path / "new", CONFIG)
    changed = {**CONFIG, **CHANGES[said]}
    with pytest.raises(UserError, match=said.replace(".", r"\.")) as caught:
        resumed(new, str(other), changed)
    assert caught.value.args[0].count(" -> ") == 1
    assert resumed(new, str(other), changed, resume_allow_changes=[said.split(":")[0]]) == 2


def test_resume_allows_differences_that_change_no_step(tmp_path):
    other, new = run(tmp_path / "other", CONFIG, 2), run(tmp_path / "new", CONFIG)
    changed = {
        **CONFIG,
        "trainer": {"devices": 2},
        "sampler": {"eta": 1},
        "training": {**CONFIG["training"], "log_every": 5},
    }
    assert resumed(new, str(other), changed) == 2
    assert (
        find_resume_checkpoint(
            {**CONFIG, "net": {"width": 9}, "resume": str(other)}, new, True, ("data", "training")
        ).step
        == 2
    )


def test_resume_from_missing_path_is_refused(tmp_path):
    new = run(tmp_path / "new", CONFIG)
    with pytest.raises(
        UserError, match=r"resume=.*nowhere: no valid checkpoint there; expected auto, must, never, a step folder"
    ):
        resumed(new, str(tmp_path / "nowhere"))
    with pytest.raises(atomic.CorruptFileError, match="step-00000009 is not there"):
        resumed(new, str(tmp_path / "step-00000009"))


def test_resume_on_other_ranks_moves_nothing(tmp_path):
    folder = run(tmp_path / "run", CONFIG, 2, 4)
    assert find_resume_checkpoint({**CONFIG, "resume": "never"}, folder, chief=False) is None
    assert (
        find_resume_checkpoint(
            {**CONFIG, "resume": str(folder / "checkpoints/step-00000002")}, folder, chief=False
        ).step
        == 2
    )
    assert names(folder / "checkpoints") == ["step-00000002", "step-00000004"]
