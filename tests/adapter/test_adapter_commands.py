"""Adapters as commands: trained on a run that stays as it is, drawn with, exported, imported, refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import read_pngs, run_sample
from smoke import command, composed, here, train

from ldm.app import requests
from ldm.app.limits import Limits
from ldm.app.session import Session
from ldm.checkpoint import adapters
from ldm.checkpoint.load import apply_adapter, load_run_config
from ldm.cli.export import main as export
from ldm.conditioner.edges import Canny
from ldm.config import build
from ldm.errors import UserError
from ldm.io import atomic, images
from ldm.runs.data_card import DataCard
from ldm.sampling.request import load_held_out

FEW = ("num=4", "steps=2", "guidance.scale=1")
STEP = (
    "metrics=none",
    "training.steps=2",
    "training.optimizer.lr=0.05",
    "training.lr_schedule.warmup=1",
    "training.sample_every=500",
)


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("adapted"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def factors(lively, place) -> Path:
    """A LoRA trained for two steps on the shared run."""
    return train("adapter=lora", f"init={lively}", "adapter.target_modules=[*attention*,*conv1]", *STEP)


def draw(*overrides: str, out: str = "drawn") -> Path:
    return run_sample(*FEW, *overrides, output_dir=out)


def test_lora_run_contains_factors_and_base(lively, factors):
    state = atomic.read_tensors(factors / "weights.safetensors")
    assert state
    assert all(name.endswith((".down", ".up")) for name in state)
    assert not (factors / "first_stage.safetensors").exists()
    assert json.loads((factors / "base.json").read_text())["path"] == str(lively)
    (step,) = (factors / "checkpoints").glob("step-*2")
    assert (step / "model.safetensors").stat().st_size < (lively / "weights.safetensors").stat().st_size / 5
    assert "of" in (factors / "log.txt").read_text()


@pytest.mark.slow
def test_adapter_scale_interpolates_base_and_run(lively, factors):
    base = read_pngs(draw(f"run={lively}"))
    assert torch.equal(read_pngs(draw(f"run={lively}", f"adapters=[{{run: {factors}, scale: 0.0}}]")), base)
    own = read_pngs(draw(f"run={factors}", out="own"))
    assert (own - base).abs().max() > 1
    assert torch.equal(read_pngs(draw(f"run={lively}", f"adapters=[{{run: {factors}}}]")), own)
    step = next((factors / "checkpoints").glob("step-*2"))
    assert torch.equal(read_pngs(draw(f"run={lively}", f"adapters=[{{run: {step}}}]")), own)
    half = f"{{run: {factors}, scale: 0.5}}"
    both = draw(f"run={lively}", f"adapters=[{half},{half}]", out="both")
    assert (read_pngs(both) - own).abs().max() <= 1
    assert command("sample.py", f"reproduce={both / '000002.png'}", "output_dir=again") == 0
    assert torch.equal(read_pngs(Path("again"))[0], read_pngs(both)[2])
    assert (read_pngs(both) - base).abs().max() > 1


@pytest.mark.slow
def test_adapter_training_resumes(lively, factors):
    whole = atomic.read_tensors(factors / "weights.safetensors")
    (factors / "metrics.json").rename(factors / "done.json")
    (factors / "weights.safetensors").unlink()
    shutil.rmtree(next((factors / "checkpoints").glob("step-*2")))
    typed = ("adapter=lora", f"init={lively}", "adapter.target_modules=[*attention*,*conv1]", *STEP)
    assert command("train.py", "budget=smoke", *typed) == 0
    again = atomic.read_tensors(factors / "weights.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_lora_export_to_peft_round_trip(lively, factors, place):
    assert export([f"run={factors}", "to=peft", "out=lora.safetensors"]) == 0
    file = place / "lora.safetensors"
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in atomic.read_tensors(file))
    own = read_pngs(draw(f"run={factors}", out="own"))
    assert (read_pngs(draw(f"run={lively}", f"adapters=[{{run: {file}}}]")) - own).abs().max() <= 1
    assert export([f"run={factors}", "to=safetensors", "out=whole.safetensors"]) == 0  # merged, a model by itself
    assert (read_pngs(draw("run=whole.safetensors")) - own).abs().max() <= 1
    assert export([f"run={lively}", "to=peft", "out=none.safetensors"]) == 2


@pytest.mark.slow
def test_controlnet_trains_and_uses_hints(lively, place, capsys):
    run = train("adapter=controlnet", f"init={lively}", *STEP)
    state = atomic.read_tensors(run / "weights.safetensors")
    assert {name.split(".")[0] for name in state} == {"copied", "hint", "zeros", "of_middle"}
    for name, value in state.items():  # two steps leave it nearly deaf
        if name.startswith(("zeros", "hint.")):
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    atomic.write_tensors(run / "weights.safetensors", state, atomic.read_metadata(run / "weights.safetensors"))
    base = read_pngs(draw(f"run={lively}", "held_out=true"))
    told = read_pngs(draw(f"run={run}", "held_out=true", out="told"))
    assert (told - base).abs().max() > 1
    assert torch.equal(read_pngs(draw(f"run={lively}", "held_out=true", f"adapters=[{{run: {run}, scale: 0}}]")), base)
    size = load_run_config(run).data.size
    edges = Canny()(load_held_out(run).batch([(0, i) for i in range(4)])["image"])
    for i, one in enumerate(edges):
        images.save_png(place / "hints" / f"{i}.png", (255 * one).to(torch.uint8))
    own = ("held_out=true", "hints=hints")
    assert torch.equal(read_pngs(draw(f"run={run}", *own)), told)
    twice = draw(
        f"run={run}",
        f"adapters=[{{run: {run}, scale: 0.5}}]",
        "hints=[hints,hints/1.png]",
        "keep_conditions=[hint,hint2]",
        "label=0",
        out="twice",
    )
    assert command("sample.py", f"reproduce={twice / '000001.png'}", "output_dir=again") == 0
    assert torch.equal(read_pngs(Path("again"))[0], read_pngs(twice)[1])
    images.save_png(place / "small.png", torch.zeros(3, size // 2, size, dtype=torch.uint8))
    capsys.readouterr()
    assert command("sample.py", f"run={run}", "hints=small.png", "output_dir=refused", *FEW) == 2
    said = capsys.readouterr().err
    assert (
        f"hints=small.png is {size}x{size // 2} (width x height): expected {size}x{size}, the size of the images"
        in said
    )
    assert command("sample.py", f"run={run}", "output_dir=refused", *FEW) == 2
    assert "hints=FILE must be given for the ControlNet of canny" in capsys.readouterr().err
    assert command("sample.py", f"run={run}", "hints=[small.png,small.png]", "output_dir=refused", *FEW) == 2
    assert "expected 1 files" in capsys.readouterr().err
    draw(f"run={run}", "hints=small.png", "preprocess_hints=true")
    session = Session.open(str(run))
    asked = requests.controlnet(session, Limits(), "small.png", True)
    assert list(session.request({"task": asked.task}, {**asked.values, "num": 1, "steps": 2}).inputs) == ["hint"]
    assert export(["run=" + str(run), "to=controlnet", "out=controlnet.safetensors"]) == 0
    assert "conv_in.weight" in atomic.read_tensors(place / "controlnet.safetensors")


@pytest.mark.slow
def test_adapter_errors_are_one_line(smoke, lively, factors, place, capsys):
    def refused(*typed: str, script: str = "sample.py") -> str:
        assert command(script, *typed) == 2
        return capsys.readouterr().err

    put = f"run={lively}", "output_dir=refused", *FEW
    assert "no such folder" in refused(*put, "adapters=[{run: nowhere}]")
    assert f"{smoke.run} is no adapter" in refused(*put, f"adapters=[{{run: {smoke.run}}}]")
    assert "expected {run: RUN, scale: 1.0}" in refused(*put, f"adapters=[{{run: {factors}, weight: 1}}]")
    assert "scale=much" in refused(*put, f"adapters=[{{run: {factors}, scale: much}}]")
    assert "expected 0 files" in refused(*put, "hints=some.png")
    assert re.search(
        "belongs to autoencoder .*, run=.* to", refused(f"run={smoke.run}", *put[1:], f"adapters=[{{run: {factors}}}]")
    )
    assert "choose it by init=RUN" in refused("budget=smoke", "adapter=lora", script="train.py")
    shutil.copytree(factors, place / "moved")
    (place / "moved" / "base.json").write_text(json.dumps({"path": str(smoke.run), "weights": "0" * 64}))
    assert "was trained on other weights" in refused(f"run={place / 'moved'}", *put[1:])
    (place / "moved" / "base.json").write_text(json.dumps({"path": "nowhere", "weights": "0" * 64}))
    assert "an adapter on nowhere, which is not there" in refused(f"run={place / 'moved'}", *put[1:])
    (place / "moved" / "base.json").write_text("{")
    assert "is damaged or gone" in refused(f"run={place / 'moved'}", *put[1:])
    assert not Path("refused").exists()


def test_load_adapter_rejects_other_network(factors):
    cfg = composed("budget=smoke", "net.channels=48")
    model = build.build_model(
        cfg, build.build_autoencoder(cfg.autoencoder, 1), DataCard("", (1, 16, 16), ["a"], [["a"]])
    )
    with pytest.raises(UserError, match=f"{factors} is an adapter of another network: .* do not match"):
        apply_adapter(model, factors)


def test_peft_file_of_other_network_is_refused(place):
    cfg = composed("budget=smoke")
    model = build.build_model(
        cfg, build.build_autoencoder(cfg.autoencoder, 1), DataCard("", (1, 16, 16), ["a"], [["a"]])
    )
    names = ("unet.mid_block.attentions.0.proj_in.lora_A.weight", "unet.mid_block.attentions.0.proj_in.lora_B.weight")
    for file, state in {
        "narrow": dict(zip(names, (torch.ones(1, 7), torch.ones(7, 1)), strict=True)),
        "elsewhere": {"unet.elsewhere.lora_A.weight": torch.ones(1, 2)},
    }.items():
        atomic.write_tensors(place / f"{file}.safetensors", state)
        with pytest.raises(UserError, match=f"{file}.safetensors is no LoRA of this network"):
            apply_adapter(model, place / f"{file}.safetensors")


def test_local_parameter_name_is_independent_of_other_adapters():
    for name in (
        "denoiser.net.middle1.res.conv1.parametrizations.weight.0.down",
        "denoiser.net.net.middle1.res.conv1.parametrizations.weight.3.down",
    ):
        assert adapters.local_parameter_name(name) == "middle1.res.conv1.down"
    assert adapters.local_parameter_name("denoiser.net.controls.2.copied.stem.weight") == "copied.stem.weight"
    assert (
        adapters.local_parameter_name("conditioner.told.told.vectors")
        == adapters.local_parameter_name("conditioner.vectors")
        == "vectors"
    )
    assert (
        adapters.local_parameter_name(
            adapters.local_parameter_name("denoiser.net.net.out.2.parametrizations.weight.1.up")
        )
        == "out.2.up"
    )
