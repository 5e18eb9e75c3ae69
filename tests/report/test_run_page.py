"""The page of runs in a real browser, opened from disk: curves, grids and table are there, work, and ask nobody for
anything.
"""

import pytest
from chromium import browser, visit
from test_browse import make, play

from ldm.report.browse import main

pytestmark = pytest.mark.slow
PLAYED = """player => new Promise(done => {
  player.ontimeupdate = () => player.currentTime > 0.02 && done(player.duration);
  player.play();
})"""


def test_run_page_works_from_disk(tmp_path):
    play(make(tmp_path / "runs" / "a", fd=4.5))
    make(tmp_path / "runs" / "b", loss=0.7, lr=0.004, fd=3.25)
    assert main([str(tmp_path / "runs"), f"out={tmp_path / 'runs.html'}"]) == 0
    with browser() as context:
        found = visit(context, f"file://{tmp_path / 'runs.html'}")
        page = found.page
        for shown in ("figure svg polyline[data-run='1']", "table.sortable tbody tr", ".grids img:visible"):
            assert page.locator(shown).first.is_visible()
        assert page.locator("figure svg polyline").first.bounding_box()["height"] > 20  # a curve, not a flat line

        def first():
            return page.locator("table.sortable tbody tr th").first.inner_text().strip()

        assert first() == "a"
        page.get_by_role("button", name="fd_fashion").click()
        assert first() == "b"  # 3.25 before 4.5
        page.get_by_role("button", name="fd_fashion").click()
        assert first() == "a"
        images = page.locator(".grids").first.locator("> img")
        assert [images.nth(i).is_visible() for i in range(2)] == [False, True]
        page.locator(".grids input[type=range]").first.press("Home")
        assert [images.nth(i).is_visible() for i in range(2)] == [True, False]
        assert page.locator(".grids output").first.inner_text() == "step-2"
        assert images.first.evaluate("image => image.naturalWidth") == 4
        assert page.locator(".players img").first.is_visible()  # the slider is of the grids alone
        for tag, seconds in (("video", 4 / 8), ("audio", 1024 / 4000)):
            assert page.locator(tag).evaluate(PLAYED) == pytest.approx(seconds, abs=0.02)
        assert page.locator("video").evaluate("one => one.videoWidth") == 16
        assert page.inner_text(".players code") == "CCCCCCO 002"
        page.locator(".picks input").first.uncheck()
        assert not page.locator("polyline[data-run='0']").first.is_visible()
        assert page.locator("td.other").count() == 1  # what differs is marked
        assert found.hosts() == set()
        assert {address.split(":")[0] for address in found.asked} <= {"file", "data"}
        assert not found.faults
