"""The benchmarks of experiments/speed start, and what they compare is the same network."""

import csv
import subprocess
import sys

import pytest
import torch
from smoke import ROOT

SPEED = ROOT / "experiments" / "speed"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))


@torch.inference_mode()
def test_what_is_timed_is_the_same_network(speed):
    import first_stage
    import sampling
    from built import told, unet, vae

    made, given = unet("tiny", 8), told("tiny", 8, 2)
    ours = sampling.ours_once(sampling.guided(sampling.denoiser_of(made), given), given)
    theirs = sampling.theirs_once(made.theirs, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    stages, z = vae("tiny"), torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(first_stage.decode(stages.ours, z), first_stage.decode(stages.theirs, z), rtol=1e-4, atol=1e-4)


def test_ratios_are_of_pairs_and_a_row_takes_the_place_of_its_like(speed, monkeypatch, tmp_path):
    import pairs

    monkeypatch.setattr(pairs, "TABLE", tmp_path / "results.csv")
    work = pairs.Work("a", "b", "c", flops=4e9)
    for peer in (3.0, 4.0):
        pairs.keep(pairs.told(work, 1, [1.0, 2.0, 4.0], [peer, peer, peer], "yes", peak=8e9))
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert (row["ratio"], row["low"], row["high"]) == ("2", "1", "4")
    assert (row["ours_ms"], row["theirs_ms"], row["ours_share"], row["theirs_share"]) == ("2000", "4000", "0.25", "0.125")


def test_the_exponent_of_a_power_is_found(speed):
    import curves

    xs = [2.0, 8.0, 32.0]
    assert curves.exponent(xs, [5 * x**1.5 for x in xs]) == pytest.approx(1.5)


@pytest.mark.slow
def test_every_benchmark_starts(tmp_path):
    parts = ("sampling", "training", "first_stage", "data", "curves")
    done = subprocess.run([sys.executable, str(SPEED / "measure.py"), *parts, "smoke=true", "pairs=1"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert len(list(csv.DictReader((tmp_path / "speed.csv").open()))) >= 12
    assert len(list(csv.DictReader((tmp_path / "curves.csv").open()))) == 5
