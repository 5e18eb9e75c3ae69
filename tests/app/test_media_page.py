"""The page of runs of sounds, clips and molecules in a real browser: it plays what is drawn, and makes it again."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from chromium import browser, visit

from ldm.app.controller import AppController
from ldm.app.limits import Limits
from ldm.app.serve import serve
from ldm.app.session import SessionCache

pytestmark = pytest.mark.slow
MEDIA = {"clip": "tiny_media.grey_clip", "sound": "tiny_media.row_sound", "molecule": "tiny_media.chain_molecule"}
LOADED = "tag => [...document.querySelectorAll(`#players ${tag}`)].filter(one => one.readyState > 0).length == 2"


def test_page_plays_clips_sounds_and_molecules(prompted, tmp_path):
    for name, medium in MEDIA.items():
        shutil.copytree(prompted, tmp_path / name)
        card = json.loads((tmp_path / name / "data.json").read_text())
        (tmp_path / name / "data.json").write_text(json.dumps({**card, "medium": medium, "rate": 8}))
    desk = AppController(SessionCache([str(tmp_path / name) for name in MEDIA]), Limits(num=4, steps=8), looks=0.05)
    with serve(desk, port=0) as address, browser() as context:
        seen = visit(context, address)
        page = seen.page
        page.wait_for_selector("#draw-words")
        assert page.get_by_role("tab", name="Inpaint").count() == 0  # what only images have
        assert not page.get_by_label("Height").is_visible()
        for name in MEDIA:
            page.click("#run input")
            page.get_by_role("option", name=name).click()
            if name != "clip":
                page.wait_for_selector(f"#stage >> text={name} is loaded.")
            page.fill("#prompt textarea", "a ring")
            page.fill("#num input", "2")
            page.fill("#steps input", "3")
            page.click("#draw-words")
            page.wait_for_selector("#stage >> text=2 images in ")
            if name == "molecule":
                page.wait_for_function("document.querySelectorAll('#players code').length == 2")
                assert page.inner_text("#players code >> nth=0").startswith("CC")
            else:
                tag = {"clip": "video", "sound": "audio"}[name]
                page.wait_for_function(LOADED, arg=tag)
                played = page.locator(f"#players {tag}").first
                played.evaluate("one => one.play()")
                page.wait_for_function(f"document.querySelector('#players {tag}').currentTime > 0.02")
                duration = played.evaluate("one => one.duration")
                assert duration == pytest.approx({"clip": 4 / 8, "sound": 32 * 32 / 4000}[name], abs=0.02)
                if name == "clip":
                    assert played.evaluate("one => [one.videoWidth, one.videoHeight]") == [16, 16]
        with page.expect_download() as download:
            page.click("#archive")
        download.value.save_as(tmp_path / "all.zip")
        names = zipfile.ZipFile(tmp_path / "all.zip").namelist()
        assert sorted(names) == [f"molecule/00000{i}.{ending}" for i in range(2) for ending in ("png", "smi")]
        page.click("#run input")
        page.get_by_role("option", name="clip").click()
        page.get_by_role("tab", name="Gallery").click()
        page.locator("#made img").first.click()
        page.wait_for_selector("#settings video")
        assert "a ring" in page.inner_text("#settings")
        page.click("#again")
        page.wait_for_selector("#again-said >> text=Made again: bit for bit the same.")
        page.wait_for_function("document.querySelectorAll('#again-said video').length == 2")
        assert seen.hosts() == {"127.0.0.1"}
        assert not seen.faults
    files = {Path(file).suffix for file in (tmp_path / "clip" / "samples").glob("*/[0-9]*.*")}
    assert files == {".mp4", ".gif", ".png"}
