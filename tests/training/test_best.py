"""Which checkpoint is the best by a number, after a resume too, and which numbers a training never writes."""

import pytest
import torch
from omegaconf import OmegaConf
from smoke import composed

from ldm.checkpoint.step import save_checkpoint
from ldm.errors import UserError
from ldm.evaluation.evaluate import EvaluationConfig
from ldm.io import atomic
from ldm.recipes.diffusion import scored_metrics
from ldm.runs import cache
from ldm.training.best import Best, lowest, read_best, require_metric, restore_best

ROWS = [
    {"step": step, "train/loss": loss, "val/psnr": psnr}
    for step, loss, psnr in ((1, 3.0, 9), (2, 1.0, 8), (3, 2.0, 11), (4, 0.5, 12))
]


def test_lowest_considers_existing_steps():
    assert lowest("train/loss", ROWS, {1, 2, 3}) == Best("train/loss", 2, 1.0)
    assert lowest("-val/psnr", ROWS, {1, 2, 3}) == Best("-val/psnr", 3, -11.0)
    assert lowest("val/nosuch", ROWS, {1, 2, 3}) is None
    assert (
        lowest("train/loss", [{"step": 1, "train/loss": None}, {"step": 2, "train/loss": float("nan")}], {1, 2}) is None
    )


def test_read_best_after_resume_uses_metrics_log(tmp_path):
    """Of the metric of now, of checkpoints that are complete, up to the step that it is resumed from."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.zeros(1)}}, {}, keep=0)
    atomic.write_json(tmp_path / "best.json", {"metric": "-val/psnr", "step": 3, "value": -11.0})
    assert restore_best(tmp_path, "train/loss", ROWS, until=3) == read_best(tmp_path) == Best("train/loss", 2, 1.0)
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"")
    assert restore_best(tmp_path, "train/loss", ROWS, until=3) == Best("train/loss", 3, 2.0)
    assert restore_best(tmp_path, "train/loss", ROWS, until=0) is None
    assert not (tmp_path / "best.json").exists()


@pytest.mark.parametrize(
    "name", [None, "", "train/loss", "-train/any", "perf/mfu", "-perf/images_per_s", "val/fd_x_1k", "-val/fd_x_1k"]
)
def test_require_metric_accepts_possible_metric(name):
    require_metric(name, {"val/fd_x_1k"})


def test_require_metric_accepts_unknown_scores():
    require_metric("val/own", None)


@pytest.mark.parametrize(
    ("name", "scores", "why", "text"),
    [
        ("val/fd_x_5k", {"val/fd_x_1k"}, "", "the metrics of this config give no such number; expected one of"),
        ("-val/fd_x", (), "nothing is scored", "nothing is scored; expected train/loss, another train/... or"),
        ("perf/none", (), "", "no such number is recorded; expected"),
        ("fd_fashion", (), "", "the numbers of metrics.jsonl begin with train/, val/ or perf/; expected"),
    ],
)  # fmt: skip
def test_require_metric_rejects_impossible_metric(name, scores, why, text):
    with pytest.raises(UserError) as error:
        require_metric(name, scores, why)
    assert str(error.value).startswith(f"keep_best={name}: {text}")


def test_scored_metrics_lists_what_training_scores():
    cfg, steps = composed("budget=smoke", "metrics=fd"), 10
    assert scored_metrics(cfg, EvaluationConfig(eval_every=5), steps) == ({"val/fd_fashion_1k"}, "")
    assert scored_metrics(cfg, EvaluationConfig(eval_every=5, eval_num=250), steps) == ({"val/fd_fashion_250"}, "")
    assert "training.score.eval_every=STEPS" in scored_metrics(cfg, EvaluationConfig(), steps)[1]
    assert "is more than training.steps=10" in scored_metrics(cfg, EvaluationConfig(eval_every=11), steps)[1]
    assert scored_metrics(composed("budget=smoke", "metrics=none"), EvaluationConfig(eval_every=5), steps) == (
        set(),
        "metrics=none measures nothing",
    )
    own = OmegaConf.merge(cfg, {"metrics": {"metrics": {"own": {"_target_": "torch.nn.Identity"}}}})
    assert scored_metrics(own, EvaluationConfig(eval_every=5), steps) == (None, "")


@pytest.mark.parametrize(
    ("step", "value"), [(1, "NaN"), (1, "Infinity"), (1, "null"), (1, '"2"'), ('"1"', 2.0), ("null", 2.0), (1.5, 2.0)]
)
def test_read_best_rejects_what_is_no_step_or_no_finite_number(step, value, tmp_path):
    (tmp_path / "best.json").write_text(f'{{"metric": "val/fd", "step": {step}, "value": {value}}}')
    assert read_best(tmp_path) is None


def test_require_metric_lists_what_is_written():
    with pytest.raises(UserError, match=r"expected one of val/a, val/b$"):
        require_metric("val/c", {"val/b", "val/a"})
    with pytest.raises(UserError, match=r"or one of perf/images_per_s, perf/data_wait, perf/mfu$"):
        require_metric("val/c", set())


def test_evaluator_training_has_no_keep_best(monkeypatch, tmp_path):
    """The judge never writes the number that its user is to be judged by."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    configs = []
    monkeypatch.setattr("ldm.config.serialize.write_config", lambda config, folder: configs.append(config))
    monkeypatch.setattr("ldm.launch.process.run_in_subprocess", lambda *args: 1)
    with pytest.raises(UserError, match="failed with exit code 1"):
        cache.ensure_evaluator(composed("budget=smoke", "keep_best=val/fd_fashion_1k", "training.score.eval_every=1"))
    assert configs[0]["keep_best"] is None
