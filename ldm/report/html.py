"""Style, scripts and charts of the HTML page of runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from ldm.plotting import BLUE, GREEN, PURPLE, RED, SKY, YELLOW

COLOURS = (BLUE, RED, GREEN, PURPLE, YELLOW, SKY)
DASHES = ("", "6 3", "2 2")  # cycled when the colours are used up
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 58, 34
STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #6b6b70; --line: #dcdce0; --paper: #fff; --mark: #fff1cc; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --soft: #9a9aa2; --line: #3a3a40; --paper: #161618; --mark: #4a3c12; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1360px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 26px; font-weight: 600; margin: 0; }
h2 { font-size: 18px; font-weight: 600; margin: 40px 0 12px; }
.soft { color: var(--soft); margin: 0 0 12px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; border-bottom: 1px solid var(--line); }
th, td { font-weight: 400; vertical-align: top; white-space: nowrap; }
thead th { color: var(--soft); font-size: 13px; vertical-align: bottom; }
.number { text-align: right; }
td { padding-left: 8px; }
td.other { background: var(--mark); }
th button { all: unset; cursor: pointer; }
th button:hover, th button:focus-visible { color: var(--ink); text-decoration: underline; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.swatch { width: 22px; height: 8px; }
.swatch line { stroke-width: 3; }
.picks { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-bottom: 16px; font-size: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 24px; }
figure { margin: 0; }
figcaption { font-size: 14px; margin-bottom: 4px; }
figure svg:not(.swatch) { width: 100%; height: auto; }
polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
polyline.off { display: none; }
.grid { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 12px; }
.end { text-anchor: end; }
.mid { text-anchor: middle; }
.samples { display: flex; flex-wrap: wrap; gap: 32px; align-items: flex-start; }
.grids { width: min(100%, 420px); }
.grids img { width: 100%; image-rendering: pixelated; display: block; }
.grids img[hidden] { display: none; }
.players { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 12px; }
.players audio, .players video { width: 100%; display: block; }
.players code { overflow-wrap: anywhere; font-size: 12px; }
.grids input { width: 100%; display: block; margin: 6px 0; }
output { color: var(--soft); }
"""

SORT_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // missing values stay last
      const order = head.classList.contains("number") ? x - y : x.localeCompare(y);
      return down ? -order : order;
    });
    table.tBodies[0].append(...rows);
  }));
}
"""

TOGGLE_SCRIPT = """
for (const box of document.querySelectorAll(".picks input"))
  box.addEventListener("change", () => {
    for (const line of document.querySelectorAll(`polyline[data-run="${box.dataset.run}"]`))
      line.classList.toggle("off", !box.checked);
  });
for (const figure of document.querySelectorAll(".grids")) {
  const slider = figure.querySelector("input"), images = [...figure.querySelectorAll(":scope > img")];
  slider?.addEventListener("input", () => {
    images.forEach((image, i) => { image.hidden = i !== Number(slider.value); });
    figure.querySelector("output").textContent = images[slider.value].alt;
  });
}
"""


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers within [low, high], about `most` at the most."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times the powers of ten whose logarithms are in [low, high]; only the powers if too many."""
    powers = [10.0**k for k in range(math.floor(low), math.ceil(high) + 1)]
    marks = [factor * power for power in powers for factor in (1, 2, 5)] if high - low < 2.5 else powers
    return [mark for mark in marks if low <= math.log10(mark) <= high]


def stroke(run: int) -> str:
    """Return the SVG stroke attributes of a run's lines."""
    dash = DASHES[run // len(COLOURS) % len(DASHES)]
    return f'stroke="{COLOURS[run % len(COLOURS)]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def run_attributes(run: int) -> str:
    """Return the SVG attributes of a run's line in a chart: its number, by which it is hidden, and its stroke."""
    return f'data-run="{run}" {stroke(run)}'


def chart(
    name: str,
    lines: Mapping[int, Sequence[tuple[float, float]]],
    names: Sequence[str],
    x_label: str = "step",
    attributes: Callable[[int], str] = run_attributes,
) -> str:
    """Render one metric's curves over the step as SVG; logarithmic if it is positive with a wide range.

    lines: run number (index into `names`) -> [(step, value)].  x_label: what is in the place of the step.
    attributes: run number -> SVG attributes of its line.
    """
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    log_scale = min(ys) > 0 and max(ys) / min(ys) > 8
    low, high = (math.log10(min(ys)), math.log10(max(ys))) if log_scale else (min(ys), max(ys))
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if log_scale else y
        across, up = (x - left) / (right - left), (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - 12), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - 10)

    parts = []
    marks = decades(low, high) if log_scale else ticks(low, high)
    for value in marks:
        y = to_pixels(left, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y + 4:.1f}">{value:.3g}</text>')
    for value in ticks(left, right, 6):
        x = to_pixels(value, marks[0] if marks else min(ys))[0]
        parts.append(f'<text class="tick mid" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}">{value:g}</text>')
    for run, line in lines.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (to_pixels(*point) for point in line))
        parts.append(f'<polyline {attributes(run)} points="{path}"><title>{escape(names[run])}</title></polyline>')
    parts.append(f'<text class="tick mid" x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 2}">{escape(x_label)}</text>')
    scale = " (log)" if log_scale else ""
    inside, label = "".join(parts), f"{escape(name)} over the {escape(x_label)}"
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{inside}</svg>'
    return f"<figure><figcaption>{escape(name)}{scale}</figcaption>{drawing}</figure>"


def swatch(run: int) -> str:
    """Return an SVG sample of a run's line."""
    return f'<svg class="swatch" viewBox="0 0 22 8"><line x1="0" x2="22" y1="4" y2="4" {stroke(run)}/></svg>'
