"""The page in a real browser: it draws, shows how far it is, stops, paints masks, makes images again, and outlives
every mistake.
"""

import json
import re
import shutil
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from chromium import browser, visit
from helpers import read_image
from PIL import Image

from ldm.app.controller import AppController
from ldm.app.limits import Limits
from ldm.app.serve import serve
from ldm.app.session import SessionCache

read_grey = partial(read_image, mode="L")

pytestmark = pytest.mark.slow
LONG = "1000"  # steps that outlast a click; all that the schedule has
SAID = """() => {
  window.said = [];
  const stage = document.querySelector("#stage");
  new MutationObserver(() => said.push(stage.innerHTML)).observe(stage, {childList: true, subtree: true, characterData:
  true});
}"""


@pytest.fixture(scope="module")
def runs(prompted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for name in ("first", "second", "broken"):
        shutil.copytree(prompted, folder / name)
    (folder / "broken" / "weights.safetensors").unlink()
    shutil.rmtree(folder / "broken" / "checkpoints")
    return folder


@pytest.fixture(scope="module")
def address(runs):
    desk = AppController(
        SessionCache([str(runs / name) for name in ("first", "second", "broken")]),
        Limits(num=16, steps=3000),
        looks=0.1,
    )
    with serve(desk, port=0) as found:
        yield found


@pytest.fixture(scope="module")
def come(address):
    """A new visitor's page; afterwards they asked nobody but this machine, and no script failed."""
    seen = []
    with browser() as context:

        def one():
            seen.append(visit(context, address))
            seen[-1].page.wait_for_selector("#draw-words")
            seen[-1].page.evaluate(SAID)
            return seen[-1].page

        yield one
        for each in seen:
            assert each.hosts() == {"127.0.0.1"}
            assert not each.faults


@pytest.fixture(scope="module")
def page(come):
    """One that the tests share: each fills in what it asks for."""
    return come()


def told(page, **fields):
    """Fill in text fields by their ids."""
    for name, value in fields.items():
        page.fill(f"#{name} textarea, #{name} input", value)


def press(page, button):
    """Press a button; what waits until the stage has said, since then, something in which a pattern is found, and gives
    its HTML.
    """
    since = page.evaluate(
        "() => (document.querySelectorAll('#stage p').forEach(one => one.dataset.old = ''), said.length)"
    )
    page.click(f"#{button}")

    def said(pattern):
        fresh = "said.slice(since).filter(text => !text.includes('data-old'))"
        look = f"([since, pattern]) => {fresh}.find(text => new RegExp(pattern).test(text)) ?? false"
        return page.wait_for_function(look, arg=[since, pattern]).json_value()

    return said


def draw(page, tab="words"):
    """Press a tab's button; what the stage says at the end."""
    return press(page, f"draw-{tab}")("images? in |Stopped|class=.fault")


def drawn(run: Path) -> set[Path]:
    return set(run.glob("samples/*/[0-9]*.png"))


def test_page_generates_png_and_shows_progress(page, runs, tmp_path):
    before = drawn(runs / "first")
    told(page, prompt="it's a ring, ${x}", negative="a disc", steps="150", num="2", seed="11")
    said = press(page, "draw-words")
    shown = said("progressbar")
    assert re.search(r"step \d+ of 150, \d+:\d\d left", shown)
    assert '<img class="expected"' in shown
    assert 'src="data:image/png;base64,' in shown
    said("2 images in ")
    new = drawn(runs / "first") - before
    assert {file.name for file in new} == {"000011.png", "000012.png"}
    text = Image.open(max(new)).text
    assert (text["prompt"], text["seed"]) == ("it's a ring, ${x}", "12")
    assert json.loads(text["reproduce"])["request"]["negative"] == "a disc"
    page.wait_for_function("document.querySelectorAll('#drawn img').length >= 2")
    with page.expect_download() as download:
        page.click("#archive")
    download.value.save_as(tmp_path / "all.zip")
    assert sorted(zipfile.ZipFile(tmp_path / "all.zip").namelist()) == ["first/000011.png", "first/000012.png"]


def test_page_stops_drawing(page, runs):
    before = drawn(runs / "first")
    told(page, prompt="a ring", steps=LONG, num="4", seed="500")
    press(page, "draw-words")("progressbar")
    press(page, "stop")("Stopped")
    assert drawn(runs / "first") == before
    told(page, steps="2", num="1")
    assert "1 image in" in draw(page)


def test_page_inpaints_only_the_mask(page, runs, tmp_path):
    before = drawn(runs / "first")
    values = torch.randint(40, 216, (32 * 32,), generator=torch.Generator().manual_seed(0))
    Image.frombytes("L", (32, 32), bytes(values.tolist())).save(tmp_path / "in.png")
    told(page, prompt="a ring", steps="3", num="2", seed="21")
    page.get_by_role("tab", name="Inpaint").click()
    page.wait_for_selector("#inpaint-editor canvas")
    page.set_input_files("#inpaint-editor input[type=file]", tmp_path / "in.png")
    page.wait_for_selector("#inpaint-editor >> text=1000%")  # the picture is there, and as large as it gets
    page.locator("#inpaint-editor").scroll_into_view_if_needed()
    box = page.locator("#inpaint-editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y - 20)
    page.mouse.down()
    page.mouse.move(x + 30, y + 20, steps=12)
    page.mouse.up()
    page.wait_for_timeout(500)  # until the stroke has been told
    assert "2 images in" in draw(page, "inpaint")
    asked = json.loads(Image.open(min(drawn(runs / "first") - before)).text["reproduce"])["request"]
    given, hole = read_grey(Path(asked["image"])), read_grey(Path(asked["mask"])) > 127
    assert torch.equal(given, read_grey(tmp_path / "in.png"))
    assert 20 < int(hole.sum()) < 500
    assert hole[12:20, 12:20].any()
    for file in drawn(runs / "first") - before:
        change = (read_grey(file) - given).abs()
        assert change[~hole].max() <= 1
        assert change[hole].float().mean() > 5
    page.get_by_role("tab", name="From noise").click()


def test_page_gallery_reproduces_image_exactly(page, runs):
    told(page, prompt="a square", negative="", steps="4", num="3", seed="31")
    draw(page)
    page.get_by_role("tab", name="Gallery").click()
    page.locator("#made img").nth(1).click()
    page.wait_for_selector("#settings table")
    said = page.inner_text("#settings")
    for part in ("a square", "seed\t32", "batch\t3", "ddim"):
        assert part in said
    page.click("#again")
    page.wait_for_selector("#again-said >> text=Made again: bit for bit the same.")
    (again,) = (runs / "first" / "samples").glob("*/000032-again/000032.png")
    (before,) = (file for file in drawn(runs / "first") if file.name == "000032.png")
    assert torch.equal(read_grey(again), read_grey(before))
    page.get_by_role("tab", name="Draw", exact=True).click()


def test_page_compares_two_runs(page, runs):
    told(page, prompt="a ring", steps="2", num="2", seed="41")
    choose(page, "compare", "second")
    assert "4 images in" in draw(page)
    page.wait_for_function("document.querySelectorAll('#drawn img, #drawn-compare img').length >= 4")
    choose(page, "compare", "none")
    for name in ("first", "second"):
        assert {"000041.png", "000042.png"} <= {file.name for file in drawn(runs / name)}


def choose(page, field, option):
    page.click(f"#{field} input")
    page.get_by_role("option", name=option).click()


def test_page_shows_clear_errors(page, tmp_path):
    told(page, prompt=" ", num="4")
    assert "the prompt is empty: write what is to be drawn" in draw(page)
    told(page, prompt="a ring", steps="10000")
    assert "steps=10000: expected 1 to 3000" in draw(page)
    told(page, steps="2")
    Image.new("RGB", (5000, 4000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    page.get_by_role("tab", name="Image to image").click()
    page.set_input_files("#restyle-file input[type=file]", tmp_path / "large.png")
    page.wait_for_selector("#restyle-file img")
    assert "the picture of 5000 x 4000 pixels, 20.0 megapixels: expected 16 at most" in draw(page, "restyle")
    choose(page, "run", "broken")
    page.wait_for_selector("#stage >> text=/no weights in it yet/")
    choose(page, "run", "second")
    page.wait_for_selector("#stage >> text=second is loaded")
    page.get_by_role("tab", name="From noise").click()
    assert "4 images in" in draw(page)


def test_page_queues_two_users(page, come):
    one, other = page, come()
    told(one, prompt="a ring", steps=LONG, num="2")
    told(other, prompt="a ring", steps="2", num="2")
    press(one, "draw-words")("progressbar")
    said = press(other, "draw-words")
    said("Waiting: 1 request before this one.")
    press(one, "stop")("Stopped")
    said("2 images in ")


def test_page_cancels_request_of_closed_tab(page, come, runs):
    gone, stays = come(), page
    told(gone, prompt="a ring", steps=LONG, num="4", seed="600")
    press(gone, "draw-words")("progressbar")
    gone.close()
    told(stays, prompt="a ring", steps="2", num="1")
    assert "1 image in" in draw(stays)
    assert not [file for file in drawn(runs / "first") if file.name == "000600.png"]
    assert threading.active_count() < 60
