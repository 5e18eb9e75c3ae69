"""The charts of the page of runs for the numbers that validation writes by noise level: val/loss_0, val/loss_1, ..."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape

from ldm.report.html import chart

Curves = Mapping[str, Sequence[tuple[float, float]]]  # name -> [(step, value)]
NAME = re.compile(r"(val/(?:loss|error|grad_norm))_(\d+)")
ABOUT = "Levels of noise, 0 the lowest; log.txt of a run has their mean times."


def is_level(name: str) -> bool:
    """Return whether a number of metrics.jsonl belongs to a noise level."""
    return NAME.fullmatch(name) is not None


def level_curves(curves: Curves) -> dict[str, dict[int, Sequence[tuple[float, float]]]]:
    """Return group -> level -> [(step, value)], as val/loss -> 0 -> ..., levels in order."""
    groups: dict[str, dict[int, Sequence[tuple[float, float]]]] = {}
    for name, line in curves.items():
        if match := NAME.fullmatch(name):
            groups.setdefault(match[1], {})[int(match[2])] = line
    return {group: dict(sorted(levels.items())) for group, levels in groups.items()}


def render_levels(curves: Sequence[Curves], names: Sequence[str]) -> str:
    """Render the section of noise levels; empty if no run has any.

    For each of the groups, a chart over the level with the last values of all runs, and one over the step for each run
    with a line per level, the darker the noisier.
    curves: of each run.  names: of the runs.
    """
    by_run = [level_curves(values) for values in curves]
    charts = []
    for group in dict.fromkeys(group for levels in by_run for group in levels):
        last = {
            run: [(level, line[-1][1]) for level, line in levels[group].items()]
            for run, levels in enumerate(by_run)
            if group in levels
        }
        charts.append(chart(f"{group}, last values", last, names, "noise level"))
        for run, levels in enumerate(by_run):
            if group in levels:
                titles = [f"level {level}" for level in range(max(levels[group]) + 1)]
                shade = partial(level_attributes, run, len(titles))
                charts.append(chart(f"{group} of {names[run]}", levels[group], titles, attributes=shade))
    about = f"<p class='soft'>{escape(ABOUT)}</p>"
    return f'<h2>Noise levels</h2>{about}<div class="charts">{"".join(charts)}</div>' if charts else ""


def level_attributes(run: int, levels: int, level: int) -> str:
    """Return the SVG attributes of a level's line: its run, and a colour from sky blue to dark purple."""
    part = level / max(levels - 1, 1)
    return f'data-run="{run}" stroke="hsl({200 + 90 * part:.0f} 70% {65 - 30 * part:.0f}%)"'
