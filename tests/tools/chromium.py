"""A real browser, headless, that writes down what it asks of whom."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Visit:
    """A page in the browser.  asked: every address it requested.  faults: what went wrong in its scripts."""

    page: Any
    asked: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))

    def hosts(self) -> set[str]:
        """Whom it asked over a network."""
        return {
            address.split("/")[2].split(":")[0]
            for address in self.asked
            if not address.startswith(("data:", "blob:", "file:"))
        }


@contextmanager
def browser() -> Iterator[Any]:
    """A context of the system's Chromium, driven by playwright.  Fails, and never skips, where there is none."""
    from playwright.sync_api import sync_playwright

    program = next((found for found in map(shutil.which, PROGRAMS) if found), None)
    assert program, "these tests look at pages in a real browser: install chromium (apt-get install chromium)"
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield opened.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        finally:
            opened.close()


def visit(context: Any, address: str) -> Visit:
    """A visitor of their own page; context: of the browser, whose cache all its pages share."""
    page = context.new_page()
    page.set_default_timeout(180_000)
    found = Visit(page)
    page.goto(address)
    return found
