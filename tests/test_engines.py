"""Every trainer does what one process does: a pairwise cover of experiments/engines, and how it compares."""

import shutil
import sys

import pytest
import torch
from smoke import ROOT

sys.path.insert(0, str(ROOT / "experiments" / "engines"))
import matrix

COVER = matrix.cover(matrix.CASES)


@pytest.fixture(scope="module")
def work(smoke, tmp_path_factory):
    """The folder of the trainings, whose cache has the shared judge and first stage."""
    before, matrix.WORK = matrix.WORK, tmp_path_factory.mktemp("engines")
    shutil.copytree(smoke.kept, matrix.WORK / "cache")
    yield matrix.WORK
    matrix.WORK = before


@pytest.mark.slow
@pytest.mark.parametrize("case", COVER, ids="-".join)
def test_resumed_run_equals_uninterrupted_run_of_one_process(case, work):
    """Losses, weights, averages, scores, checkpoints, under each trainer, optimiser, feature and way of resuming."""
    row = matrix.measured(case)
    assert row["agree"] == "yes", str(row)


def test_cover_contains_every_pair():
    every = {pair for case in matrix.CASES for pair in matrix.pairs(case)}
    assert {pair for case in COVER for pair in matrix.pairs(case)} == every
    assert len(COVER) < len(matrix.CASES) / 5


def outcome(step=0.0, kept=("step-00000004", "step-00000006", 4)):
    """What a run leaves, its numbers shifted."""
    start, end = {"w": torch.zeros(2)}, {"w": torch.ones(2) + step}
    rows = [{"train/loss": 1.0 + step}], [{"val/fd": 1.0 + step}]
    losses, scores = rows
    ways = {"way of weights": start, "way of averages": start}
    return {"losses": losses, "scores": scores, "weights": end, "averages": end, **ways, "kept": list(kept)}


@pytest.mark.parametrize(
    ("found", "agree"),
    [
        (outcome(), "yes"),
        (outcome(1e-12), "yes"),
        (outcome(1e-3), "NO"),
        (outcome(kept=("step-00000002", "step-00000006", 2)), "NO"),
        (outcome() | {"scores": []}, "NO"),
        (outcome() | {"averages": {}}, "NO"),
        (outcome() | {"losses": [{"train/loss": 1.0}, {"train/loss": float("nan")}]}, "NO"),
    ],
)
def test_compared_detects_any_difference(found, agree):
    assert matrix.compared(found, outcome(), matrix.BOUNDS["64"])["agree"] == agree


def test_compared_detects_non_finite_values():
    rows = [{"train/loss": 1.0}, {"train/loss": float("nan")}, {"train/loss": 1.0}]
    assert matrix.of_rows(rows, [{"train/loss": 1.0}] * 3) == float("inf")
