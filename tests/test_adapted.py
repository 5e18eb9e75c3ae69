"""Adapters as commands: trained on a run that stays as it is, drawn with, several at once, exported, imported, refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from smoke import command, here, train

from ldm import durable

FEW = ("num=4", "steps=2", "guidance.scale=1")
STEP = ("metrics=none", "training.steps=2", "training.optimizer.lr=0.05", "training.grid_every=500")


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("adapted"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def factors(lively, place) -> Path:
    """A LoRA trained for two steps on the shared run."""
    return train("adapter=lora", f"init={lively}", "adapter.where=[*attention*,*conv1]", *STEP)


def draw(*typed: str, out: str = "drawn") -> Path:
    shutil.rmtree(out, ignore_errors=True)
    assert command("sample.py", f"out={out}", *FEW, *typed) == 0
    return Path(out)


def pixels(folder: Path) -> torch.Tensor:
    return torch.stack([torch.tensor(list(Image.open(file).tobytes())) for file in sorted(folder.glob("[0-9]*.png"))])


def test_a_run_holds_the_factors_and_names_its_base(lively, factors):
    state = durable.read_tensors(factors / "weights.safetensors")
    assert state
    assert all(name.endswith((".down", ".up")) for name in state)
    assert not (factors / "first_stage.safetensors").exists()
    assert json.loads((factors / "base.json").read_text())["path"] == str(lively)
    (step,) = (factors / "checkpoints").glob("step-*2")
    assert (step / "model.safetensors").stat().st_size < (lively / "weights.safetensors").stat().st_size / 5
    assert "of" in (factors / "log.txt").read_text()


def test_at_scale_zero_it_is_the_base_and_at_one_the_run(lively, factors):
    base = pixels(draw(f"run={lively}"))
    assert torch.equal(pixels(draw(f"run={lively}", f"adapters=[{{run: {factors}, scale: 0.0}}]")), base)
    own = pixels(draw(f"run={factors}", out="own"))
    assert (own - base).abs().max() > 1
    assert torch.equal(pixels(draw(f"run={lively}", f"adapters=[{{run: {factors}}}]")), own)
    step = next((factors / "checkpoints").glob("step-*2"))
    assert torch.equal(pixels(draw(f"run={lively}", f"adapters=[{{run: {step}}}]")), own)
    half = f"{{run: {factors}, scale: 0.5}}"
    both = draw(f"run={lively}", f"adapters=[{half},{half}]", out="both")
    assert (pixels(both) - own).abs().max() <= 1
    assert command("sample.py", f"again={both / '000002.png'}", "out=again") == 0
    assert torch.equal(pixels(Path("again"))[0], pixels(both)[2])
    assert (pixels(both) - base).abs().max() > 1


def test_it_goes_on_where_it_was_stopped(lively, factors):
    whole = durable.read_tensors(factors / "weights.safetensors")
    (factors / "metrics.json").rename(factors / "done.json")
    (factors / "weights.safetensors").unlink()
    shutil.rmtree(next((factors / "checkpoints").glob("step-*2")))
    typed = ("adapter=lora", f"init={lively}", "adapter.where=[*attention*,*conv1]", *STEP)
    assert command("train.py", "budget=smoke", *typed) == 0
    again = durable.read_tensors(factors / "weights.safetensors")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_diffusers_layout_goes_out_and_comes_in(lively, factors, place):
    from ldm.export import main

    assert main([f"run={factors}", "to=peft", "out=lora.safetensors"]) == 0
    file = place / "lora.safetensors"
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in durable.read_tensors(file))
    own = pixels(draw(f"run={factors}", out="own"))
    assert (pixels(draw(f"run={lively}", f"adapters=[{{run: {file}}}]")) - own).abs().max() <= 1
    assert main([f"run={factors}", "to=safetensors", "out=whole.safetensors"]) == 0  # merged, a model by itself
    assert (pixels(draw("run=whole.safetensors")) - own).abs().max() <= 1
    assert main([f"run={lively}", "to=peft", "out=none.safetensors"]) == 2


def test_a_controlnet_is_told_hints(lively, place):
    run = train("adapter=controlnet", f"init={lively}", *STEP)
    state = durable.read_tensors(run / "weights.safetensors")
    assert {name.split(".")[0] for name in state} == {"copied", "hint", "zeros", "of_middle"}
    for name, value in state.items():  # two steps leave it nearly deaf
        if name.startswith(("zeros", "hint.")):
            value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    durable.write_tensors(run / "weights.safetensors", state, durable.read_metadata(run / "weights.safetensors"))
    base = pixels(draw(f"run={lively}", "held_out=true"))
    told = pixels(draw(f"run={run}", "held_out=true", out="told"))
    assert (told - base).abs().max() > 1
    assert torch.equal(pixels(draw(f"run={lively}", "held_out=true", f"adapters=[{{run: {run}, scale: 0}}]")), base)
    from ldm import picture
    from ldm.conditioner.edges import Canny
    from ldm.load import config_of
    from ldm.request import held_out

    size = config_of(run).data.size
    edges = Canny()(held_out(run).batch([(0, i) for i in range(4)])["image"])
    for i, one in enumerate(edges):
        picture.save(place / "hints" / f"{i}.png", (255 * one).to(torch.uint8))
    own = ("held_out=true", "hints=hints")
    assert torch.equal(pixels(draw(f"run={run}", *own)), told)
    twice = draw(
        f"run={run}", f"adapters=[{{run: {run}, scale: 0.5}}]", "hints=[hints,hints/1.png]", "hold=[hint,hint2]", "label=0", out="twice"
    )
    assert command("sample.py", f"again={twice / '000001.png'}", "out=again") == 0
    assert torch.equal(pixels(Path("again"))[0], pixels(twice)[1])
    assert size == Image.open("hints/0.png").size[0]


def test_what_does_not_fit_is_one_line(smoke, lively, factors, place, capsys):
    def refused(*typed: str, script: str = "sample.py") -> str:
        assert command(script, *typed) == 2
        return capsys.readouterr().err

    put = f"run={lively}", "out=refused", *FEW
    assert "no such folder" in refused(*put, "adapters=[{run: nowhere}]")
    assert f"{smoke.run} is no adapter" in refused(*put, f"adapters=[{{run: {smoke.run}}}]")
    assert "expected {run: RUN, scale: 1.0}" in refused(*put, f"adapters=[{{run: {factors}, weight: 1}}]")
    assert "scale=much" in refused(*put, f"adapters=[{{run: {factors}, scale: much}}]")
    assert "expected 0 files" in refused(*put, "hints=some.png")
    assert "init=RUN says which" in refused("budget=smoke", "adapter=lora", script="train.py")
    other = train("net.channels=48", "name=other", "metrics=none")
    said = refused(f"run={other}", "out=refused", *FEW, f"adapters=[{{run: {factors}}}]")
    assert "another network" in said or "belongs to autoencoder" in said
    shutil.copytree(factors, place / "moved")
    (place / "moved" / "base.json").write_text(json.dumps({"path": str(smoke.run), "weights": "0" * 64}))
    assert "was trained on other weights" in refused(f"run={place / 'moved'}", "out=refused", *FEW)
    assert not Path("refused").exists()
