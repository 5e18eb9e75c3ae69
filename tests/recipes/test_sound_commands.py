"""Own sounds from the folder to the loudspeaker: a model and a vocoder trained, resumed, and asked for sounds."""

import json
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from helpers import assert_one_line_error
from smoke import command, here, train
from test_experiments import some_sounds

from ldm.io import atomic

SOUNDS = ("data=sounds", "data.path=sounds", "data.seconds=0.256", "data.test_fraction=0.5", "metrics=none")
VOCODER = (
    *("training=vocoder", "~training.score", "~training.sample_every", "training.steps=4", "training.save_every=2"),
    *("training.net.width=8", "training.net.hidden=8", "training.net.depth=1", "training.num=3"),
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds")
    some_sounds(folder / "sounds")
    with here(folder):
        yield folder


@pytest.fixture(scope="module")
def model(place) -> Path:
    return train(*SOUNDS)


@pytest.fixture(scope="module")
def vocoder(place) -> Path:
    return train(*SOUNDS, *VOCODER)


def test_vocoder_resumes_to_the_same_weights(vocoder):
    """After a kill behind step 2: what the run wrote later is gone."""
    weights = atomic.read_tensors(vocoder / "weights.safetensors")
    metrics = json.loads((vocoder / "metrics.json").read_text())
    for path in (vocoder / "metrics.json", vocoder / "weights.safetensors"):
        path.unlink()
    shutil.rmtree(sorted((vocoder / "checkpoints").glob("*4"))[-1])
    assert command("train.py", "budget=smoke", "runs=runs", *SOUNDS, *VOCODER) == 0
    again = atomic.read_tensors(vocoder / "weights.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in again.items())
    found = json.loads((vocoder / "metrics.json").read_text())
    assert {**found, "seconds": 0} == {**metrics, "seconds": 0}
    assert found["griffin_lim/mel"] < found["mel"]  # four steps are no training


def test_sample_writes_wavs_by_griffin_lim_or_the_vocoder(model, vocoder):
    typed = (f"run={model}", "num=2", "steps=2")
    assert command("sample.py", *typed, "output_dir=plain") == 0
    assert command("sample.py", *typed, f"vocoder={vocoder}", "output_dir=other") == 0
    for name in ("000000", "000001"):
        plain, other = (soundfile.read(Path(folder) / f"{name}.wav")[0] for folder in ("plain", "other"))
        assert len(plain) == len(other) == 4_096
        assert abs(plain - other).max() > 0
        assert (Path("plain") / f"{name}.png").read_bytes() != b""
    assert json.loads((model / "data.json").read_text())["medium"] == "sound"


def test_sound_file_is_filled_and_restyled(model, capfd):
    source = sorted(Path("sounds").iterdir())[0]
    for task in ("fill_sound", "restyle_sound"):
        typed = (f"run={model}", f"task={task}", f"image={source}", "num=1", "steps=2", f"output_dir={task}")
        assert command("sample.py", *typed, *(["start=0.128"] if task == "fill_sound" else [])) == 0
        assert len(soundfile.read(f"{task}/000000.wav")[0]) == 4_096
    assert command("sample.py", "reproduce=fill_sound/000000.png") == 0
    assert "bit for bit the same" in capfd.readouterr().out
    Path("no.wav").write_bytes(b"no sound")
    typed = (f"run={model}", "task=fill_sound", "num=1", "steps=1")
    assert_one_line_error(capfd, "image=no.wav cannot be read as a sound", "sample.py", *typed, "image=no.wav")
    assert_one_line_error(
        capfd, "start=0.3 end=null: expected seconds", "sample.py", *typed, f"image={source}", "start=0.3"
    )


def test_vocoder_of_another_kind_is_named(model, capfd):
    message = "that run trained no vocoder; expected one made by train.py training=vocoder"
    assert_one_line_error(capfd, message, "sample.py", f"run={model}", f"vocoder={model}")
