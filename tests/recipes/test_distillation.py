"""Students trained from a run by the command, drawn from with its own samplers, and teachers that do not fit."""

from pathlib import Path

import pytest
import torch
from smoke import command, here, train

from ldm.checkpoint.load import load_model
from ldm.io import atomic

TAUGHT = ("metrics=none", "training.cond_drop_prob=0.0")
WAYS = {
    "progressive": (
        ("objective.steps=4", "timestep_spacing=uniform"),
        ("sampler=ddim", "timestep_spacing=uniform", "steps=4", "guidance=cfg"),
    ),
    "consistency": (
        ("objective.steps=8", "timestep_spacing=uniform"),
        ("sampler=consistency", "timestep_spacing=uniform", "steps=2", "guidance=cfg"),
    ),
    "guidance_distillation": (
        ("net=smoke_guidance_embed", "guidance=embedded"),
        ("guidance=embedded", "guidance.scale=3", "steps=3"),
    ),
    "knowledge_distillation": (("net.channels=32",), ("steps=3",)),
}


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("distillation"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way == "guidance_distillation" else pytest.mark.slow) for way in WAYS]
)
def test_distilled_student_trains_and_samples(way, lively, smoke):
    typed, asked = WAYS[way]
    teacher, begun = (smoke.run, ()) if way == "knowledge_distillation" else (lively, (f"init={lively}",))
    run = train(f"objective={way}", f"objective.teacher.run={teacher}", *TAUGHT, *begun, *typed)
    assert not [name for name in atomic.read_tensors(run / "weights.safetensors") if "teacher" in name], (
        "a teacher is named, not kept"
    )
    before, after = (list(load_model(one).denoiser.state_dict().values()) for one in (lively, run))
    assert way == "knowledge_distillation" or not all(map(torch.equal, before, after[: len(before)]))
    assert command("sample.py", f"run={run}", "num=2", *asked) == 0


@pytest.mark.slow
def test_distillation_rejects_teacher_of_other_latents_or_schedule(lively, smoke, capfd):
    def refused(expected, *typed):
        capfd.readouterr()
        assert command("train.py", "budget=smoke", *TAUGHT, "objective=progressive", *typed) == 2
        assert expected in (error := capfd.readouterr().err.strip()), error
        assert "\n" not in error

    refused("distillation needs a teacher: objective.teacher.run=RUN")
    refused("run=nowhere: no such folder", "objective.teacher.run=nowhere")
    refused("belongs to autoencoder", f"objective.teacher.run={lively}", f"init={smoke.run}")
    refused(
        "was trained on another noise schedule",
        f"objective.teacher.run={smoke.run}",
        f"init={smoke.run}",
        "schedule=linear",
    )
