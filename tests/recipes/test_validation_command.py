"""Validation as commands: what is written, shown and stored, what is refused, and the same after a kill or by two."""

import json
import re
import shutil
import signal
from functools import partial

import pytest
import torch
from PIL import Image
from smoke import command, composed, here, processes

from ldm.diffusion.fixed_pairs import fixed_quantiles
from ldm.errors import UserError
from ldm.io import atomic
from ldm.recipes.validation import held_out_subset, validation_metrics
from ldm.report import browse
from ldm.runs import metrics_log
from ldm.training.validation import ValidationConfig

SMOKE = ("train.py", "budget=smoke", "metrics=none", "training.steps=4", "training.sample_every=100")
VALIDATED = ("training.validation.every=2", "training.validation.num=6", "training.validation.levels=2")
LEVELS = {"val/loss", "val/error", *(f"val/{name}_{level}" for name in ("loss", "error") for level in (0, 1))}


def validation_rows(run):
    rows = metrics_log.read_metrics_log(run / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name != "wall"}
        for row in rows
        if any(name.startswith("val/") for name in row)
    ]


@pytest.fixture(scope="module")
def validated(smoke, tmp_path_factory):
    """A run with validation, and one without."""
    folder, runs = tmp_path_factory.mktemp("validated"), []
    with here(folder, LDM_CACHE=str(smoke.folder / "cache")):
        for name, typed in (("with", (*VALIDATED, "keep_best=-val/loss_1", "logger=tensorboard")), ("without", ())):
            assert command(*SMOKE, f"runs={name}", *typed) == 0
            runs += (folder / name).iterdir()
    return runs


def test_validation_writes_levels_and_final_loss(validated):
    run, other = validated
    rows = validation_rows(run)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row.keys() - {"step"} == LEVELS for row in rows)
    for row in rows:
        assert row["val/loss"] == pytest.approx((row["val/loss_0"] + row["val/loss_1"]) / 2, rel=1e-12)
    final = json.loads((run / "metrics.json").read_text())
    assert {name: final[name] for name in ("val/loss", "val/error")} == {
        name: rows[-1][name] for name in ("val/loss", "val/error")
    }
    assert "val/loss" not in json.loads((other / "metrics.json").read_text())
    assert not validation_rows(other)
    assert "validation  6 of 512 held-out images, 2 noise levels" in (run / "log.txt").read_text()
    u = torch.stack([fixed_quantiles(range(6), level, 2) for level in (0, 1)])
    t = ((u * 1000).floor() + 1) / 1000  # whichever images they are
    printed = re.search(r"validation  mean t of the levels: ([\d.]+), ([\d.]+)\n", (run / "log.txt").read_text())
    assert [float(word) for word in printed.groups()] == pytest.approx(t.mean(1).tolist(), abs=1e-3)


def test_validation_changes_neither_name_nor_weights_of_run(validated):
    run, other = validated
    assert run.name == other.name
    for file in ("weights.safetensors", "checkpoints/step-00000004/model.safetensors"):
        weights, expected = atomic.read_tensors(run / file), atomic.read_tensors(other / file)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_keep_best_of_a_level(validated):
    run, _ = validated
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    highest = max(validation_rows(run), key=lambda row: row["val/loss_1"])
    assert best == {"metric": "-val/loss_1", "step": highest["step"], "value": -highest["val/loss_1"]}


def test_validation_is_mirrored_by_logger(validated):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = validated
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= LEVELS
    values = [event.value for event in events.Scalars("val/loss_1")]
    assert values == pytest.approx([row["val/loss_1"] for row in validation_rows(run)], rel=1e-6)


def test_page_of_run_has_curve_and_levels(validated):
    run, other = validated
    page = browse.render_page([browse.read_run(run), browse.read_run(other)])
    assert "<figcaption>val/loss</figcaption>" in page
    assert "<figcaption>val/loss, last values</figcaption>" in page
    assert f"<figcaption>val/error of {run.name}</figcaption>" in page
    assert "<figcaption>val/loss_0" not in page


@pytest.mark.parametrize(
    ("metric", "options", "text"),
    [
        ("val/loss", {}, "keep_best=val/loss: nothing is validated; expected training.validation.every=STEPS"),
        ("-val/error_3", {"every": 1, "levels": 3}, "keep_best=-val/error_3: expected a level of 0 to 2, as in"),
        (
            "val/grad_norm_0",
            {"every": 1},
            "keep_best=val/grad_norm_0: expected a level of 0 to 7, as in val/loss_7, or",
        ),
    ],
)
def test_keep_best_of_number_that_validation_does_not_write_is_refused(metric, options, text):
    with pytest.raises(UserError) as error:
        validation_metrics(metric, ValidationConfig(**options), 10)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("metric", [None, "train/loss", "val/loss", "-val/error_2", "val/fd_x_1k", "val/grad_norm_0"])
def test_keep_best_of_number_that_validation_writes_is_accepted(metric):
    options = ValidationConfig(every=1, levels=3, grad_norms=True)
    assert validation_metrics(metric, options, 10) == options.metric_names(10)


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("keep_best=val/loss", "keep_best=val/loss: nothing is validated"),
        ("training.validation.density=uniform", "training.validation.density=uniform: expected null or a node"),
    ],
)
def test_invalid_validation_is_refused_before_training(typed, text, tmp_path, capsys):
    with here(tmp_path):
        assert command(*SMOKE, typed) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert text in error
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("typed", ["every=true", "levels=1.5", "grad_norms=2", "num=null"])
def test_validation_of_wrong_type_is_refused_by_strict_check(typed):
    with pytest.raises(UserError, match=r"^training.validation.{}: .*expects".format(typed.replace(".", r"\."))):
        composed("budget=smoke", f"training.validation.{typed}")


def test_data_without_held_out_images_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for i in range(12):
        Image.new("L", (16, 16), 20 * i).save(tmp_path / "images" / f"{i}.png")
    typed = ("budget=smoke", "data=folder", f"data.path={tmp_path / 'images'}", "data.size=16", "data.channels=1")
    options = ValidationConfig(every=3)
    with pytest.raises(UserError) as error:
        held_out_subset(composed(*typed, "data.test_fraction=0"), options)
    expected = "training.validation.every=3: these data hold out no image; expected null, or data of which some images"
    assert str(error.value).startswith(expected)
    assert str(error.value).endswith("data.test_fraction=0.1")
    assert held_out_subset(composed(*typed, "data.test_fraction=0"), ValidationConfig()) is None
    subset = held_out_subset(composed(*typed, "data.test_fraction=0.5"), options)
    assert 0 < len(subset) < 12


TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision='64'")
NORMS = ("training.validation.grad_norms=true", "training.save_every=2", "training.log_every=1")


@pytest.fixture(scope="module")
def whole(smoke, tmp_path_factory):
    """The rows of validation of one process that nothing happened to, in float64."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(smoke.kept, folder / "cache")
    (done,) = processes((*SMOKE, *VALIDATED, *NORMS, "trainer=cpu", "trainer.precision='64'"), cwd=folder)
    assert done.returncode == 0, done.stdout
    (run,) = (folder / "runs").iterdir()
    return validation_rows(run)


@pytest.mark.slow
def test_two_processes_have_validation_of_one(whole, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    done = processes(*[(*SMOKE, *VALIDATED, *NORMS, *TWO)] * 2, cwd=tmp_path)
    assert not any(one.returncode for one in done), done
    (run,) = (tmp_path / "runs").iterdir()
    rows = validation_rows(run)
    assert len(rows) == len(whole) == 2
    for row, expected in zip(rows, whole, strict=True):
        assert row == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_killed_and_resumed_run_has_rows_of_validation_of_one_never_killed(whole, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    job = (*SMOKE, *VALIDATED, *NORMS, "trainer=cpu", "trainer.precision='64'")
    run = partial(processes, job, cwd=tmp_path)
    assert run(kill_at=3, kill=signal.SIGKILL)[0].returncode == -signal.SIGKILL
    (done,) = run()
    assert done.returncode == 0, done.stdout
    assert "resuming from step 2 " in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert validation_rows(folder) == whole


@pytest.mark.slow
def test_two_sharded_processes_have_validation_of_one(smoke, tmp_path):
    rows = []
    for name, ranks, trainer in (("one", 1, "cpu"), ("two", 2, "fsdp")):
        shutil.copytree(smoke.kept, tmp_path / name / "cache")
        job = (*SMOKE, *VALIDATED, *NORMS, f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.precision='32'")
        done = processes(*[(*job, "objective=log_variance")] * ranks, cwd=tmp_path / name)
        assert not any(one.returncode for one in done), done
        (run,) = (tmp_path / name / "runs").iterdir()
        rows.append(validation_rows(run))
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
