"""Runs side by side in a terminal: what differs in their configs, their curves, their numbers; and the same as a page."""

import math
from collections.abc import Sequence
from typing import Any

from ldm.config.tree import flatten
from ldm.io.extras import extra
from ldm.report import browse

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, low: float, high: float) -> str:
    """A curve as one line of bars between low and high, the last value of each part of it; of a wide range of losses the logarithm."""
    logged = low > 0 and high / low > 8
    scale = [math.log(value) if logged else value for value in (*values, low, high)]
    *heights, low, high = scale
    parts = [heights[max(math.ceil((i + 1) * len(heights) / width) - 1, 0)] for i in range(min(width, len(heights)))]
    reach = (high - low) or 1.0
    return "".join(BARS[min(int((value - low) / reach * len(BARS)), len(BARS) - 1)] for value in parts)


def format_comparison(shown: Sequence[browse.RunRecord], width: int = 24) -> str:
    """Three tables, each with a column a run, as text."""
    import io

    with extra("report", "the comparison of runs"):
        from rich.console import Console
        from rich.table import Table

    console = Console(file=io.StringIO(), width=max(100, 30 + (width + 14) * len(shown)), highlight=False)

    def table(title: str, cells: Sequence[Sequence[str]]) -> None:
        made = Table("", *(run.name for run in shown), title=title, title_justify="left", box=None, pad_edge=False)
        for line in cells:
            made.add_row(*line)
        if cells:
            console.print(made, "", sep="\n")

    known = [run for run in shown if run.config]
    table(
        "Configs: what is not the same in all",
        [[key, *map(_plain, values)] for key, values in browse.config_differences(known)],
    )
    curves = [browse.metric_curves(run.metrics_log, 10**9) for run in shown]
    names = sorted(
        {name for one in curves for name in one},
        key=lambda name: (name != "train/loss", name.startswith("perf/"), name),
    )
    table("Curves, and where they end", [[name, *_curve_cells(name, curves, width)] for name in names])
    numbers = [
        {key: value for key, value in flatten(run.metrics or {}).items() if browse._number(value)} for run in shown
    ]
    scores = list(dict.fromkeys(key for one in numbers for key in one if "/" not in key and "." not in key))
    table("Numbers", [[key, *(_plain(one.get(key, "")) for one in numbers)] for key in scores])
    return console.file.getvalue()  # type: ignore[attr-defined]


def _curve_cells(name: str, curves: Sequence[dict[str, list[tuple[float, float]]]], width: int) -> list[str]:
    every = [y for one in curves for _, y in one.get(name, ())]
    low, high = min(every), max(every)
    lines = [[y for _, y in one.get(name, ())] for one in curves]
    return [f"{sparkline(line, width, low, high)} {line[-1]:.4g}" if line else "" for line in lines]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
