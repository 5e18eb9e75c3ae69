"""Errors along the noise: those of Gaussian data are known exactly, and a run's are written beside it."""

from itertools import pairwise

import pytest
import torch
from oracle import Gaussian
from smoke import here

from ldm.cli.errors import run_guarded
from ldm.diffusion.schedule import Flow, cosine
from ldm.report import __main__, levels, rows
from ldm.tensors import KeyedNoise


@pytest.mark.parametrize("schedule", [cosine(), Flow()], ids=["cosine", "flow"])
def test_errors_by_snr_of_gaussian_data_equal_posterior_variance(schedule):
    data, noise = Gaussian(schedule), KeyedNoise(0, list(range(2000)))
    x0 = data.mean + data.std * noise.normal("data", torch.empty(2000, 4))
    found = levels.errors_by_snr(data, schedule, x0, noise, 6, lambda t, eps: {"loss": 2 * t})
    assert [row["t"] for row in found] == sorted(row["t"] for row in found)
    for before, after in pairwise(found):
        assert before["log_snr_low"] == after["log_snr_high"] > after["log_snr_low"]
    for row in found:
        ends = schedule.t_from_log_snr(torch.tensor([row["log_snr_high"], row["log_snr_low"]], dtype=torch.float64))
        least, most = data.posterior_variance(ends).tolist()
        assert least * 0.9 < row["x0_error"] < most * 1.1  # of MSE's minimum, which grows with the noise
        assert row["loss"] == pytest.approx(2 * row["t"], rel=1e-5)
    share = [row["x0_error"] / row["eps_error"] for row in found]  # sigma^2 / alpha^2
    assert share == sorted(share)


@pytest.mark.slow
def test_levels_command_writes_csv_to_run(smoke, lively, capsys):
    with here(smoke.folder):
        assert run_guarded(lambda: __main__.main(["levels", str(lively), "num=8", "bins=3"])) == 0
    kept = rows.read(lively / "levels.csv")
    assert [len(kept), set(kept[0])] == [3, {"log_snr_high", "log_snr_low", "t", "x0_error", "eps_error", "loss"}]
    assert (lively / "levels.png").stat().st_size < 100_000
    assert kept[0]["x0_error"][:4] in capsys.readouterr().out
    assert run_guarded(lambda: __main__.main(["levels", str(lively), "bins=0"])) == 2
    assert run_guarded(lambda: __main__.main(["levels"])) == 2
    assert "run=... must be given" in capsys.readouterr().err
