"""Pictures of the page at work, into this folder: python experiments/page/shots.py RUN [OTHER]

RUN is a folder of the main job's runs, and OTHER, to be drawn beside it, another or a step of it. The system's Chromium
is driven by
playwright.
"""

import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image

from ldm.app.controller import AppController
from ldm.app.serve import serve
from ldm.app.session import SessionCache, expand_runs
from ldm.cli.errors import run_guarded
from ldm.errors import UserError
from ldm.io import atomic

HERE = Path(__file__).parent
SIZE = {"width": 1280, "height": 900}


def shot(page, name: str) -> None:
    """What is seen, as a PNG of few colours."""
    page.wait_for_timeout(400)
    image = Image.open(BytesIO(page.screenshot())).convert("RGB").quantize(96, dither=Image.Dither.NONE)
    buffer = BytesIO()
    image.save(buffer, "PNG", optimize=True)
    atomic.write_bytes(HERE / f"{name}.png", buffer.getvalue())
    print(f"{name}.png: {len(buffer.getvalue()) / 1000:.0f} kB")


def ask(page, tab: str = "words", **fields: str) -> None:
    """Fill in the fields and press a tab's button."""
    for name, value in fields.items():
        page.fill(f"#{name} textarea, #{name} input", value)
    page.click(f"#draw-{tab}")


def main(argv: list[str]) -> int:
    """The command; returns its exit code. Raises UserError."""
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not argv or program is None:
        raise UserError("python experiments/page/shots.py RUN [OTHER], where chromium is installed")
    runs = expand_runs(argv)
    with sync_playwright() as driver, serve(AppController(SessionCache(runs)), port=0) as address:
        page = driver.chromium.launch(executable_path=program, args=["--no-sandbox"]).new_page(viewport=SIZE)
        page.set_default_timeout(300_000)
        page.goto(address)
        page.wait_for_selector("#draw-words")
        ask(page, prompt="a photo of an ankle boot", steps="100", num="16", seed="1")
        page.wait_for_function("document.querySelector('[role=progressbar]')?.ariaValueNow > 20")
        shot(page, "progress")
        page.click("#stop")
        page.wait_for_selector("#stage >> text=Stopped")
        ask(page, prompt="a photo of a sneaker", steps="20", num="16", seed="0")
        page.wait_for_function("document.querySelectorAll('#drawn img').length == 16")
        shot(page, "drawn")
        ask(page, steps="10000")
        page.wait_for_selector("#stage .fault")
        shot(page, "refused")
        page.get_by_role("tab", name="Gallery").click()
        page.locator("#made img").nth(5).click()
        page.wait_for_selector("#settings table")
        page.click("#again")
        page.wait_for_selector("#again-said >> text=bit for bit")
        page.wait_for_function("document.querySelectorAll('#both img').length == 2")
        shot(page, "gallery")
        file = page.locator("#settings td").last.inner_text()
        page.get_by_role("tab", name="Draw", exact=True).click()
        page.get_by_role("tab", name="Inpaint").click()
        page.set_input_files("#inpaint-editor input[type=file]", Path(file).absolute())
        page.wait_for_selector("#inpaint-editor >> text=1000%")
        page.locator("#inpaint-editor").scroll_into_view_if_needed()
        box = page.locator("#inpaint-editor canvas").first.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x - 60, y + 10)
        page.mouse.down()
        page.mouse.move(x + 60, y + 40, steps=15)
        page.mouse.up()
        page.wait_for_timeout(500)
        ask(page, "inpaint", prompt="a sneaker with a strap", steps="20", num="8")
        page.wait_for_function("document.querySelectorAll('#drawn img').length == 8")
        shot(page, "inpaint")
        if len(runs) > 1:
            page.get_by_role("tab", name="From noise").click()
            page.click("#compare input")
            page.get_by_role("option", name=Path(runs[1]).name).click()
            ask(page, prompt="a photo of a bag", num="8")
            page.wait_for_function("document.querySelectorAll('#drawn-compare img').length == 8")
            shot(page, "beside")
    return 0


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
