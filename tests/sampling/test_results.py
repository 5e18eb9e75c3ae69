"""The images of a request, sampled with a model whose answer is known: files, records, grid, and what is refused."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import read_image
from omegaconf import OmegaConf
from PIL import Image
from smoke import composed
from test_tasks import model

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import X0
from ldm.diffusion.schedule import cosine
from ldm.errors import UserError
from ldm.io.images import save_png
from ldm.media.medium import load_medium
from ldm.model import LatentDiffusion
from ldm.runs.data_card import DataCard
from ldm.sampling import request, run
from ldm.sampling.request import SampleRequest
from ldm.sampling.tasks import img2img, super_resolution

SHAPE = (1, 8, 12)


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Return a function (changes to the config, shape of a sample) -> the request."""

    def asked(shape=SHAPE, **changes) -> SampleRequest:
        folder = tmp_path / "run"
        config = OmegaConf.create({"data": {"_target_": "ldm.data.synthetic.Synthetic"}})
        source = SimpleNamespace(
            folder=folder, config=config, data_card=DataCard("some", shape), adapters=(), latent_space="f2c1-some"
        )
        source.has_dataset = True
        monkeypatch.setattr(request, "open_model", lambda name: source)
        monkeypatch.chdir(tmp_path)
        cfg = composed("run=x", name="sample").copy()
        chosen = {"num": 3, "steps": 2, "seed": 40, "batch_size": 2, "output_dir": str(tmp_path / "out"), **changes}
        for name, value in {"run": str(folder), "guidance.scale": 1.0, "guidance.interval": None, **chosen}.items():
            OmegaConf.update(cfg, name, value, merge=False)
        return SampleRequest.from_config(cfg)

    return asked


def files(folder) -> list[str]:
    return sorted(file.name for file in folder.glob("*")) if folder.exists() else []


def test_each_image_is_saved_under_its_seed_with_its_record(ask, tmp_path, capsys):
    made, asked = model(), ask(prompt="four")
    images = run.generate_images(made, asked)
    assert list(images) == [40, 41, 42]
    level = round((0.5 * 0.1 * 4 + 1) * 127.5)  # half of x0, which is a tenth of the caption's length
    assert all(torch.equal(image, torch.full(SHAPE, level, dtype=torch.uint8)) for image in images.values())
    assert files(tmp_path / "out") == ["000040.png", "000041.png", "000042.png"]
    file = tmp_path / "out" / "000042.png"
    assert torch.equal(read_image(file), images[42][0])
    with Image.open(file) as image:
        text = image.text
    assert (text["prompt"], text["seed"]) == ("four", "42")
    record = json.loads(text["reproduce"])
    assert (record["row"], record["rows"], record["weights"]) == (2, [2], run.hash_model(made))
    assert "samples.npz" not in capsys.readouterr().out
    run.generate_images(made, replace(asked, record={"weights": record["weights"]}))
    with pytest.raises(UserError, match="was sampled with other weights"):
        run.generate_images(made, replace(asked, record={"weights": "other"}))
    assert list(run.generate_images(made, replace(asked, saved_rows=[1]))) == [41]


def test_images_are_decoded_in_tiles(ask, tmp_path, monkeypatch):
    from ldm.autoencoder import tiled

    seen, plain = [], tiled.Tiled
    monkeypatch.setattr(tiled, "Tiled", lambda *given: seen.append(given[1:]) or plain(*given))
    images = run.generate_images(model(), ask(prompt="four", tile=8, save="grid"))
    assert seen == [(8, 2)]
    assert len(images) == 3
    assert files(tmp_path / "out") == []


class Line(torch.nn.Module):
    """A first stage of samples (C, L) that are their latents."""

    z_channels, factor = 1, 1

    def decode(self, z):
        return z


class Told(torch.nn.Module):
    """Says that x0 is 3, outside of what an image can be."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, x, t, cond):
        return self.weight.expand_as(x)


class Nothing(torch.nn.Module):
    keys, context_dim, vector_dim = (), None, None

    def forward(self, batch):
        return Condition()

    null = forward


def test_samples_that_are_no_images_keep_their_values(ask, tmp_path, capsys, monkeypatch):
    made = LatentDiffusion(Line(), Nothing(), Denoiser(Told(), cosine(), X0()), (16,))
    asked = ask((1, 16))
    samples = run.generate_images(made, asked)
    said = capsys.readouterr().out
    assert "samples.npz" in said
    assert files(tmp_path / "out") == []
    assert all(sample.dtype == torch.float32 for sample in samples.values())
    assert run.save_results(asked, samples, {}) is None
    with np.load(tmp_path / "out" / "samples.npz") as file:
        np.testing.assert_allclose(file["samples"], torch.stack(list(samples.values())))
        assert file["samples"].shape == (3, 1, 16)
    assert files(tmp_path / "out") == ["metrics.json", "samples.npz"]
    run.generate_images(made, replace(asked, save="none"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(run.generate_images(made, asked)) == [41, 42]
    assert "samples.npz" not in capsys.readouterr().out


def gray(count: int) -> dict[int, torch.Tensor]:
    return {40 + i: torch.full(SHAPE, i, dtype=torch.uint8) for i in range(count)}


def test_results_are_written_as_save_says(ask, tmp_path, capsys):
    out = tmp_path / "out"
    for count, columns in ((9, 3), (65, 16)):
        made = ask(num=count, prompt="a", save="grid")
        run.save_results(made, gray(count), {})
        assert read_image(out / "grid.png").shape[1] == columns * (2 * SHAPE[2] + 2) + 2
    assert files(out) == ["grid.png", "metrics.json"]
    asked = ask(num=2, prompt="a", save="none", output_dir=str(tmp_path / "none"))
    score = {"fd_some": 2.0, "score/cat": 1.25, "count": 3}
    assert run.save_results(asked, gray(2), score) == 2.0
    said = capsys.readouterr().out
    assert "fd_some" in said
    assert "score/cat" not in said
    assert "seeds 40..41" in said
    assert files(tmp_path / "none") == ["metrics.json"]
    kept = json.loads((tmp_path / "none" / "metrics.json").read_text())
    assert {name: kept[name] for name in score} == score
    colour = {seed: image.expand(3, -1, -1) for seed, image in gray(2).items()}
    asked = ask((3, 8, 12), num=2, prompt="a", save="npz", output_dir=str(tmp_path / "npz"))
    assert run.save_results(asked, colour, {}) is None
    with np.load(tmp_path / "npz" / "samples.npz") as file:
        (values,) = (file[name] for name in file.files)
    np.testing.assert_array_equal(values, torch.stack(list(colour.values())).permute(0, 2, 3, 1))


def test_images_of_all_processes_are_gathered_by_seed(monkeypatch):
    from torch import distributed

    def gather(parts, own):
        assert len(parts) == 2
        parts[:] = [own, {39: gray(1)[40], 45: gray(1)[40]}]

    assert list(run.gather_images(gray(3), 2)) == [40, 41]
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather_object", gather)
    assert list(run.gather_images(gray(3), 3)) == [39, 40, 41]


def test_conditions_that_the_model_has_not_are_refused(ask):
    made = model()
    run.check_conditions(made, ask(prompt="four", negative="x"))
    made.conditioner.keys = ("label",)
    for changes, said in (
        ({"prompt": "four", "negative": "x"}, "prompt=four: this model has no text condition; expected label=..."),
        ({"negative": "x"}, "negative=x: this model has no text condition"),
        ({"crop": [0, 0]}, "crop=[0, 0]: this model has no size condition"),
        ({"keep_conditions": ["mask"]}, "keep_conditions=mask: this model's conditions are label"),
    ):
        with pytest.raises(UserError) as raised:
            run.check_conditions(made, ask(**changes))
        assert said in str(raised.value)
    made.conditioner.keys = ()
    with pytest.raises(UserError, match="expected no prompt"):
        run.check_conditions(made, ask(prompt="four"))
    run.check_conditions(made, ask())


def test_inputs_that_neither_task_nor_model_reads_are_refused(ask):
    def unmarked(model, batch, noise, ts):
        raise AssertionError

    made, asked = model(), ask(prompt="four")
    for task, keys in ((img2img, ()), (super_resolution, ("low_res",)), (unmarked, ())):
        made.conditioner.keys = ("caption", *keys)
        name = "low_res" if task is super_resolution else "image"
        run.check_conditions(made, replace(asked, task=partial(task), inputs={name: None}))
    made.conditioner.keys = ("caption",)
    with pytest.raises(UserError, match="low_res: this model has no such condition"):
        run.check_conditions(made, replace(asked, task=partial(super_resolution), inputs={"low_res": None}))


def test_prompts_that_diffusers_reads_otherwise_are_noted_once(ask, monkeypatch, capsys, tmp_path):
    from ldm.conditioner import clip

    monkeypatch.setattr(clip, "clean_text", lambda text: text.replace("&amp;", "&") if "&amp;" in text else None)
    made, (prompt, negative) = model(), (ask(prompt="a &amp; b"), ask(negative="c &amp; d"))
    encoder = SimpleNamespace(clip=torch.nn.Identity())
    made.conditioner.cache = SimpleNamespace(encoder=encoder)
    run.note_cleaned(made, prompt)
    assert capsys.readouterr().err == ""  # no folder of diffusers
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_index.json").touch()
    for asked, words in ((prompt, "'a &amp; b' is read as 'a & b'"), (negative, "'c &amp; d'"), (ask(prompt="a"), "")):
        run.note_cleaned(made, asked)
        said = capsys.readouterr().err
        assert words in said
        assert bool(said) == bool(words)
    monkeypatch.setenv("RANK", "1")
    run.note_cleaned(made, prompt)
    monkeypatch.delenv("RANK")
    run.note_cleaned(model(), prompt)
    assert capsys.readouterr().err == ""


def test_numbers_that_json_has_not_are_written_as_in_yaml():
    values = (float("inf"), -float("inf"), float("nan"), 1.5, 3, "a", None)
    assert [run._as_json(value) for value in values] == [".inf", "-.inf", ".nan", 1.5, 3, "a", None]


def test_an_image_is_compared_with_a_file(tmp_path):
    image = torch.randint(1, 200, (3, 4, 5), dtype=torch.uint8)
    save_png(tmp_path / "a.png", image)
    compared = partial(run.compare_with_file, tmp_path / "a.png", medium=load_medium("image"))
    assert compared(image) == "bit for bit the same"
    image[1, 2, 3] += 9
    assert compared(image) == "the largest difference is 9 of 255 grey levels"
