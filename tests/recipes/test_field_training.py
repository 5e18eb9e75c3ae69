"""Trainings on fields: the least noise needs float32, and what a command does for a person with trajectories."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from smoke import command, here

from ldm.errors import UserError
from ldm.recipes.checks import check_precision

FIELDS = ("budget=smoke", "data=trajectories", "data.path=waves.npy", "autoencoder=identity", "metrics=none")
FIELDS += ("conditioner=state_before", "net=unet_1d", "net.channels=8", "training.latents=online", "guidance=cfg")
FIELDS += ("process=pde_refiner", "sampler=ddpm", "guidance.scale=1.0", "trainer=cpu")


@pytest.mark.parametrize(
    ("schedule", "precision", "is_lost"),
    [
        ("pde_refiner", "bf16", True),
        ("pde_refiner", "fp16", False),
        ("pde_refiner", "32", False),
        ("cosine", "bf16", False),
        ("Flow", "bf16", False),
    ],
)
def test_precision_that_loses_the_least_noise_is_one_line(schedule, precision, is_lost):
    node = {"_target_": f"ldm.diffusion.schedule.{schedule}"}
    cfg = SimpleNamespace(schedule=node, trainer={"precision": precision})
    if not is_lost:
        check_precision(cfg)
        return
    with pytest.raises(
        UserError, match=r"^trainer.precision=bf16: the least noise of this schedule, 0.00063 of [^\n]*$"
    ):
        check_precision(cfg)


@pytest.mark.slow
def test_own_trajectories_with_holes_train_and_are_forecast(tmp_path, capfd):
    """A file with a state that is not finite: two pairs are left out, in one line; held-out changes are drawn."""
    states = np.sin(np.arange(32) * 0.4 + np.arange(6)[:, None] * 0.5 + np.arange(10)[:, None, None])[:, :, None]
    states[0, 2, 0, 5] = np.nan
    with here(tmp_path):
        np.save("waves.npy", states)
        assert command("train.py", *FIELDS) == 0
        assert "waves-train: 43 pairs of successive states, 2 that are not finite left out" in capfd.readouterr().out
        (run,) = (tmp_path / "runs").iterdir()
        assert json.loads((run / "data.json").read_text())["medium"] == "field"
        assert command("sample.py", f"run={run}", "held_out=true", "num=2", "steps=4", "output_dir=drawn") == 0
        assert list((tmp_path / "drawn").rglob("*.npz"))
        states[:] = np.nan
        np.save("waves.npy", states)
        assert command("train.py", *FIELDS, "name=other") == 2
    assert "no pair of successive states is finite" in capfd.readouterr().err
