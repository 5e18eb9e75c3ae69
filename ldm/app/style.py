"""Style sheet of the page, and the few pieces of HTML that Gradio does not provide."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
.gradio-container { width: 100%; }
.gradio-container main { width: 100%; max-width: 1240px !important; margin: 0 auto; }
footer { display: none !important; }
#head h1 { font-size: 22px; font-weight: 600; margin: 8px 0 0; }
#head p, .soft { color: #6b6b70; margin: 0; font-size: 14px; }
.dark #head p, .dark .soft { color: #a1a1aa; }
#stop, #archive { width: auto; min-width: 96px; flex: none; align-self: flex-start; }
.grid-wrap { min-height: 0 !important; }
#stage p, #again-said p { margin: 4px 0; font-size: 14px; overflow-wrap: anywhere; }
.fault { color: #b3261e; }
.dark .fault { color: #f2b8b5; }
.track { height: 4px; background: var(--border-color-primary); border-radius: 2px; overflow: hidden; }
.track div { height: 100%; background: #0072b2; transition: width 0.2s linear; }
.expected {
  display: block; width: min(100%, 460px); margin-top: 12px; border-radius: 4px; image-rendering: pixelated;
}
.players { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 8px; }
.players figure { margin: 0; width: 260px; font-size: 14px; }
.players audio, .players video { width: 100%; display: block; }
.players code { overflow-wrap: anywhere; }
.crisp img, .crisp canvas { image-rendering: pixelated; }
table.settings, .settings tr, .settings td, .settings th { border: 0 !important; }
table.settings { border-collapse: collapse; font-size: 14px; width: 100%; }
table.settings th { text-align: left; font-weight: 400; color: #6b6b70; padding: 3px 16px 3px 0; vertical-align: top; }
table.settings td { padding: 3px 0; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; font-size: 13px; }
.legend i {
  display: inline-block; width: 12px; height: 12px; border: 1px solid var(--border-color-primary); margin-right: 5px;
}
"""


def head(name: str, about: str) -> str:
    """Return the title of the page."""
    return f"<h1>{escape(name)}</h1><p>{escape(about)}</p>"


def note(text: str) -> str:
    """Return one line in a muted colour."""
    return f"<p class='soft'>{escape(text)}</p>"


def error(text: str) -> str:
    """Return an error message."""
    return f"<p class='fault' role='alert'>{escape(text)}</p>"


def progress(done: int, total: int, seconds: float, image: str) -> str:
    """Return a progress bar with a preview; image: data URL of the images expected at this step."""
    minutes, left = divmod(round(seconds), 60)
    words = f"step {done} of {total}, {minutes}:{left:02d} left"
    inside = f"<div style='width:{100 * done / total:.1f}%'></div>"
    bar = f"<div class='track' role='progressbar' aria-valuenow='{done}' aria-valuemax='{total}'>{inside}</div>"
    preview = f"<img class='expected' alt='the images expected at step {done}' src='{escape(image)}'>"
    return f"<p class='soft'>{words}</p>{bar}{preview}"


def table(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    rows = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in values.items()
    )
    return f"<table class='settings'>{rows}</table>"


def legend(colours: Sequence[tuple[int, int, int]]) -> str:
    """Return a legend of the colours of a map's classes."""
    spots = "".join(
        f"<span><i style='background:rgb{colour}'></i>{number}</span>" for number, colour in enumerate(colours)
    )
    return f"<div class='legend'>{spots}</div>"
