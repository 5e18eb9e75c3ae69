"""The page without its looks: what is asked comes to the same images as sample.py's, one request after another, a
mistake to one line.
"""

import json
import shutil
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import read_image, write_image
from PIL import Image
from smoke import command, composed, here

from ldm.app import compose, requests, storage
from ldm.app.controller import AppController, Settings
from ldm.app.limits import Limits
from ldm.app.queue import RequestQueue
from ldm.app.session import SessionCache, expand_runs
from ldm.config.build import to_container
from ldm.diffusion import grids, sampler
from ldm.diffusion.denoiser import Denoised
from ldm.diffusion.schedule import cosine
from ldm.errors import UserError
from ldm.sampling.monitor import SamplerMonitor, SamplingCancelled

read_grey = partial(read_image, mode="L")

SOME = Settings(label="ring", steps=3, num=3, seed=5, scale=2.0)


@pytest.fixture(scope="module")
def runs(lively, prompted, tmp_path_factory):
    """Copies of a run told labels and of one told captions: their folders are written to."""
    folder = tmp_path_factory.mktemp("page")
    for name, run in {"labels": lively, "captions": prompted}.items():
        shutil.copytree(run, folder / name)
    return folder


@pytest.fixture(scope="module")
def desk(runs):
    return AppController(
        SessionCache([str(runs / "labels"), str(runs / "captions")]),
        Limits(num=8, steps=50, side=96, megapixels=0.5),
        looks=0.01,
    )


@pytest.fixture
def ask(desk, runs):
    """The last view of what is drawn from a run."""

    def last(form=requests.generate, fields=(32, 32), settings=SOME, run="labels", who="me"):
        *_, view = desk.draw(who, [str(runs / run)], form, fields, settings)
        return view

    return last


def test_compose_request_equals_command_line_config():
    words = "it's ${oc.env:HOME}, ???"
    ours = compose.compose_request(
        {"task": "img2img", "sampler": "heun"}, {"run": "x", "prompt": words, "image": "a=b.png", "guidance.scale": 3.0}
    )
    theirs = composed("task=img2img", "sampler=heun", "run=x", "guidance.scale=3.0", name="sample")
    assert to_container(ours) == to_container(theirs) | {
        "prompt": words,
        "image": "a=b.png",
        "inputs": to_container(ours)["inputs"],
    }
    assert to_container(ours)["inputs"]["image"]["path"] == "a=b.png"
    for choices, values, said in [
        ({"sampler": "../x"}, {}, "sampler=../x: expected one of consistency, ddim"),
        ({}, {"steps": "many"}, "steps=many: expected a whole number"),
    ]:
        with pytest.raises(UserError, match=said):
            compose.compose_request(choices, values)


def test_controller_image_equals_sample_command(ask, runs, capfd):
    view = ask()
    files = view.images[0]
    assert [file.name for file in files] == ["000005.png", "000006.png", "000007.png"]
    with here(runs):
        typed = ("label=ring", "steps=3", "num=3", "seed=5", "guidance.scale=2.0", "size=[32,32]", "output_dir=typed")
        assert command("sample.py", "run=labels", *typed) == 0
        for file in files:
            assert torch.equal(read_grey(file), read_grey(runs / "typed" / file.name))
        assert command("sample.py", f"reproduce={files[1]}") == 0
    assert "made again, bit for bit the same" in capfd.readouterr().out
    assert files[0].is_relative_to(runs / "labels" / "samples")
    assert json.loads(Image.open(files[1]).text["reproduce"])["row"] == 1
    assert zipfile.ZipFile(view.archive).namelist() == [f"labels/{file.name}" for file in files]
    assert zipfile.ZipFile(view.archive).read(f"labels/{files[0].name}") == files[0].read_bytes()


def test_controller_reproduces_gallery_image_exactly(desk, ask, runs):
    drawn = ask(settings=Settings(label="disc", steps=2, num=3)).images[0]
    run = str(runs / "labels")
    assert set(drawn) <= set(desk.list_images(run))
    *_, view = desk.repeat("me", run, drawn[2])
    assert "Made again: bit for bit the same." in view.stage
    before, after = view.images[0]
    assert before == drawn[2]
    assert torch.equal(read_grey(before), read_grey(after))
    assert after not in desk.list_images(run)
    said = storage.image_settings(drawn[2])
    assert (said["class"], said["seed"], said["batch"], said["steps"], said["sampler"]) == ("disc", 2, 3, 2, "ddim")


def test_controller_draws_two_runs_from_same_seeds(desk, runs):
    both = [str(runs / "labels"), str(runs / "captions")]
    *_, view = desk.draw("me", both, requests.generate, (32, 32), Settings(prompt="a ring", steps=2, num=2, seed=3))
    assert [[file.name for file in files] for files in view.images] == [["000003.png", "000004.png"]] * 2
    assert {file.parents[2].name for files in view.images for file in files} == {"labels", "captions"}
    assert len(zipfile.ZipFile(view.archive).namelist()) == 4


def test_controller_draws_checkpoint_next_to_run(smoke, tmp_path):
    run = shutil.copytree(smoke.run, tmp_path / "run")
    step = str(run / "checkpoints" / "step-00000002")
    desk = AppController(SessionCache(expand_runs([str(run), step])), looks=0.01)
    *_, view = desk.draw(
        "me", desk.sessions.runs, requests.generate, (32, 32), Settings(label="ring", steps=2, num=1, seed=9)
    )
    assert view.images, view.stage
    (ours,), (theirs,) = view.images
    assert theirs.parent.name == f"{ours.parent.name}-step-00000002"
    assert torch.equal(read_grey(ours), read_grey(theirs))  # it is the run's last
    *_, again = desk.repeat("me", step, theirs)
    assert "bit for bit the same" in again.stage


def test_controller_previews_denoised_image(desk, runs):
    views = list(desk.draw("me", [str(runs / "labels")], requests.generate, (32, 32), Settings(steps=50, num=1)))
    shown = [view.stage for view in views if "role='progressbar'" in view.stage]
    assert shown
    assert "of 50, 0:0" in shown[-1]
    assert "data:image/png;base64," in shown[-1]


def test_monitor_does_not_change_samples():
    schedule, x = cosine(), torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ts = grids.trailing(schedule, 5)

    def denoise(x_t, t):
        return Denoised(0.5 * x_t, 0.3 * x_t + 0.1)

    watch = SamplerMonitor()
    for draw in (sampler.ddim, sampler.heun):
        plain = draw(denoise, schedule, x, ts, torch.zeros_like)
        assert torch.equal(plain, watch.wrap(lambda z: z)(draw)(denoise, schedule, x, ts, torch.zeros_like))
        assert (watch.state.done, watch.state.total) == (5, 5)
    watch.stop.set()
    with pytest.raises(SamplingCancelled):
        watch.wrap(lambda z: z)(sampler.ddim)(denoise, schedule, x, ts, torch.zeros_like)


def test_controller_stop_leaves_no_files(desk, runs):
    run = str(runs / "labels")
    before = set((runs / "labels" / "samples").rglob("*"))
    asked_for = desk.draw("me", [run], requests.generate, (32, 32), Settings(steps=50, num=8, seed=77))
    view = next(asked_for)
    while "progressbar" not in view.stage:
        view = next(asked_for)
    desk.stop("me")
    *_, last = asked_for
    assert "Stopped" in last.stage
    assert last.images is None
    assert set((runs / "labels" / "samples").rglob("*")) == before


def test_queue_serves_one_request_at_a_time(desk, runs):
    go = threading.Event()
    first = desk.line.start(lambda job: go.wait(600))
    views = desk.draw("b", [str(runs / "labels")], requests.generate, (32, 32), Settings(steps=2, num=1))
    assert "Looking at the request" in next(views).stage
    assert "Waiting: 1 request before this one." in next(views).stage
    go.set()
    *_, last = views
    assert first.done.is_set()
    assert last.images


def test_controller_cancels_request_of_closed_page(desk, runs, ask):
    gone = desk.draw("gone", [str(runs / "labels")], requests.generate, (32, 32), Settings(steps=50, num=8, seed=78))
    next(gone)
    next(gone)
    gone.close()
    desk.disconnect("gone")
    assert ask().images
    assert not list((runs / "labels" / "samples").rglob("000078.png"))


def test_queue_refuses_when_full_and_survives_errors(capsys):
    line, go = RequestQueue(most=1), threading.Event()
    first = line.start(lambda job: go.wait(600))
    second = line.start(lambda job: 1 / 0)
    assert (line.position(first), line.position(second)) == (0, 1)
    with pytest.raises(UserError, match="2 requests are before this one"):
        line.start(lambda job: None)
    go.set()
    assert second.done.wait(600)
    assert "ZeroDivisionError in the program, which keeps running" in second.error
    assert "division by zero" in capsys.readouterr().err
    third = line.start(lambda job: "made")
    assert third.done.wait(600)
    assert third.result == "made"


MISTAKES = {
    "no prompt": (
        {"settings": Settings(prompt="  "), "run": "captions"},
        "the prompt is empty: write what is to be drawn",
    ),
    "many steps": ({"settings": Settings(steps=10_000)}, "steps=10000: expected 1 to 50; raise it with most_steps="),
    "no steps": ({"settings": Settings(steps=None)}, "steps: expected a whole number"),
    "half a step": ({"settings": Settings(steps=2.5)}, "steps=2.5: expected a whole number"),
    "many images": ({"settings": Settings(num=9)}, "num=9: expected 1 to 8"),
    "no number": ({"settings": Settings(seed=float("nan"))}, "seed=nan: expected a whole number"),
    "below zero": ({"settings": Settings(seed=-1)}, "seed=-1: expected 0 to"),
    "guidance": ({"settings": Settings(scale=None)}, "guidance None: expected a number"),
    "no such class": ({"settings": Settings(label="sneaker")}, "label=sneaker: expected one of disc"),
    "many words": (
        {"settings": Settings(prompt="a" * 2001), "run": "captions"},
        "prompt of 2001 characters: expected 2000 at most",
    ),
    "too large": ({"fields": (128, 32)}, "images of 32 x 128 pixels: expected a side of 1 to 96"),
    "no multiple": ({"fields": (30, 32)}, "all sides must be multiples of 4"),
    "no picture": ({"form": requests.img2img, "fields": (None, 0.6)}, "no picture was given"),
    "no image": ({"form": requests.img2img, "fields": ("text.png", 0.6)}, "the picture cannot be read as an image"),
    "megapixels": (
        {"form": requests.img2img, "fields": ("large.png", 0.6)},
        "the picture of 1000 x 600 pixels, 0.6 megapixels: expected 0.5",
    ),
    "nothing to add": ({"form": requests.outpaint, "fields": ("in.png", 0, 0, 0, 0)}, "expected pixels to add"),
    "much to add": (
        {"form": requests.outpaint, "fields": ("in.png", 64, 64, 0, 0)},
        "images of 160 x 32 pixels: expected a side of 1 to 96",
    ),
    "nothing painted": (
        {"form": requests.inpaint, "fields": ({"background": Image.new("L", (8, 8)), "layers": []},)},
        "nothing was painted",
    ),
    "painted megapixels": (
        {"form": requests.inpaint, "fields": ({"background": Image.new("L", (1000, 600)), "layers": []},)},
        "the picture of 1000 x 600 pixels, 0.6 megapixels: expected 0.5",
    ),
    "no ground": ({"form": requests.inpaint, "fields": (None,)}, "a picture is missing"),
    "no such run": ({"run": "../elsewhere"}, "expected one of"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_controller_reports_error_in_one_line(name, ask, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(Path("in.png"))
    Path("text.png").write_text("no picture")
    Image.new("L", (1000, 600)).save("large.png")
    before = set(runs.rglob("*.png"))
    given, said = MISTAKES[name]
    view = ask(**given)
    assert "class='fault'" in view.stage
    assert said.replace("'", "&#x27;") in view.stage
    assert view.images is None
    assert {file for file in set(runs.rglob("*.png")) - before if file.parent.name != "given"} == set()


def test_controller_skips_run_with_missing_weights(runs, ask):
    shutil.copytree(runs / "labels", runs / "broken")
    (runs / "broken" / "weights.safetensors").unlink()
    shutil.rmtree(runs / "broken" / "checkpoints")
    desk = AppController(SessionCache([str(runs / "broken"), str(runs / "labels")]), looks=0.01)
    *_, view = desk.draw("me", [str(runs / "broken")], requests.generate, (32, 32), SOME)
    assert "no weights in it yet" in view.stage
    *_, view = desk.draw("me", [str(runs / "labels")], requests.generate, (32, 32), SOME)
    assert view.images
    shutil.rmtree(runs / "broken")


def test_controller_inpaints_only_the_mask(ask, tmp_path):
    image = Image.open(write_image(tmp_path / "in.png"))
    stroke = Image.new("RGBA", image.size, (0, 0, 0, 0))
    stroke.paste((213, 94, 0, 255), (8, 4, 20, 12))
    view = ask(requests.inpaint, ({"background": image.convert("RGBA"), "layers": [stroke], "composite": None},))
    known = torch.ones(32, 32, dtype=torch.bool)
    known[4:12, 8:20] = False
    for file in view.images[0]:
        change = (read_grey(file) - read_grey(tmp_path / "in.png")).abs()
        assert change[known].max() <= 1
        assert change[~known].float().mean() > 5


def test_controller_runs_img2img_and_outpaint(ask, runs, tmp_path):
    file = write_image(tmp_path / "in.png")
    assert read_grey(ask(requests.img2img, (str(file), 0.5)).images[0][0]).shape == (32, 32)
    wide = read_grey(ask(requests.outpaint, (str(file), 8, 0, 0, 16)).images[0][0])
    assert wide.shape == (48, 40)
    assert (wide[:32, 8:] - read_grey(file)).abs().max() <= 1
    (kept,) = {one for one in (runs / "labels" / "given").iterdir() if one.read_bytes() == file.read_bytes()}
    assert kept.suffix == ".png"


def test_painted_map_becomes_class_indices():
    colours = requests.palette(6)
    assert len(set(colours)) == 6
    assert colours[:3] == requests.palette(3)
    values = torch.arange(6).repeat(4, 1)
    shown = Image.new("RGB", (6, 4))
    shown.putdata([colours[i] for i in values.flatten().tolist()])
    near = shown.point(lambda value: min(value + 6, 255))  # as an editor's edges are
    for image in (shown, near):
        assert list(requests.classes_from_colours(image, colours).tobytes()) == values.flatten().tolist()


def test_expand_runs_lists_runs_of_folder(runs):
    assert {Path(run).name for run in expand_runs([str(runs)])} == {"labels", "captions"}
    assert expand_runs([str(runs / "labels"), str(runs / "labels")]) == [str(runs / "labels")]
    with pytest.raises(UserError, match="no such folder"):
        expand_runs([str(runs / "nowhere")])
