"""Scores while a model trains: of averaged weights, named by network and number, without a trace in the training."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from smoke import command, here

from ldm.checkpoint import step
from ldm.ema import PowerEMA
from ldm.evaluation.evaluate import EvaluationConfig, format_count
from ldm.io import atomic
from ldm.runs import metrics_log
from ldm.training.checkpoints import EMASnapshots


@pytest.mark.parametrize(("n", "said"), [(5000, "5k"), (50000, "50k"), (250, "250"), (1500, "1500"), (0, "0")])
def test_format_count_abbreviates_like_papers(n, said):
    assert format_count(n) == said


@pytest.mark.parametrize("wrong", [{"eval_every": 0}, {"eval_every": -1}, {"eval_every": 1, "eval_num": 1}])
def test_evaluation_config_rejects_invalid_periods(wrong):
    with pytest.raises(ValueError, match="expected null or a step or more"):
        EvaluationConfig(**wrong)
    with pytest.raises(ValueError, match="snapshot_every=0"):
        EMASnapshots(Path(), {}, 0, 1)


def test_evaluation_while_training_is_named_and_leaves_no_trace(smoke, tmp_path, monkeypatch):
    lent = []
    applied = PowerEMA.swapped_in
    monkeypatch.setattr(PowerEMA, "swapped_in", lambda self: lent.append(self) or applied(self))
    often = ("training.score.eval_every=1", "training.score.eval_num=20", "keep_best=val/fd_fashion_20")
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("train.py", "budget=smoke", "name=watched", *often) == 0
        (run,) = (tmp_path / "runs").iterdir()
    assert run.name.rsplit("-", 2)[1:] == smoke.run.name.rsplit("-", 2)[1:]  # the same training, by its name
    rows = [
        row
        for row in metrics_log.read_metrics_log(run / "metrics.jsonl")
        if any(name.startswith("val/") for name in row)
    ]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(
        row.keys() >= {"val/fd_fashion_20", "val/kid_fashion_20", "val/recall_20", "val/accuracy_20"} for row in rows
    )
    assert rows[0]["val/fd_fashion_20"] != rows[1]["val/fd_fashion_20"]
    assert len(lent) == 4  # and for the pictures, and at the end
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    lowest = min(rows, key=lambda row: row["val/fd_fashion_20"])
    assert best == {"metric": "val/fd_fashion_20", "step": lowest["step"], "value": lowest["val/fd_fashion_20"]}
    assert (
        step.load_checkpoint(run / "checkpoints" / f"step-{lowest['step']:08d}").step == lowest["step"]
    )  # though step 1 is no saving step
    one, other = (atomic.read_tensors(place / "weights.safetensors") for place in (run, smoke.run))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_keep_best_rejects_metric_never_written(tmp_path, capsys):
    with here(tmp_path):
        assert command("train.py", "budget=smoke", "keep_best=val/nosuch", "training.score.eval_every=1") == 2
        text = "keep_best=val/nosuch: the metrics of this config give no such number; expected one of val/accuracy_1k, "
        assert text in capsys.readouterr().err
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_keep_best_with_changed_metric_restarts_best(smoke, tmp_path):
    typed = ("train.py", "budget=smoke", "metrics=none", "training.steps=3", "training.save_every=1", "keep_last=5")
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command(*typed, "keep_best=-perf/images_per_s") == 0
        (run,) = (tmp_path / "runs").iterdir()
        former = json.loads((run / "checkpoints" / "best.json").read_text())
        assert former["metric"] == "-perf/images_per_s"
        shutil.rmtree(run / "checkpoints" / "step-00000003")
        (run / "metrics.json").unlink()
        assert command(*typed, "keep_best=train/loss") == 0
    row = min((row for row in metrics_log.read_metrics_log(run / "metrics.jsonl")), key=lambda row: row["train/loss"])
    best = json.loads((run / "checkpoints" / "best.json").read_text())
    assert best == {"metric": "train/loss", "step": row["step"], "value": row["train/loss"]}
