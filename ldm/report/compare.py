"""Compare runs in a terminal: differences of their configs, their curves and their scores."""

import math
from collections.abc import Sequence
from typing import Any

from ldm.config.tree import flatten
from ldm.io.extras import extra
from ldm.report import browse

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, low: float, high: float) -> str:
    """Draw a curve as one line of bars between low and high; logarithmic for a wide range of positive values.

    width: number of bars; each shows the last value of its part of the curve.
    """
    log_scale = low > 0 and high / low > 8
    scale = [math.log(value) if log_scale else value for value in (*values, low, high)]
    *heights, low, high = scale
    parts = [heights[max(math.ceil((i + 1) * len(heights) / width) - 1, 0)] for i in range(min(width, len(heights)))]
    span = (high - low) or 1.0
    return "".join(BARS[min(int((value - low) / span * len(BARS)), len(BARS) - 1)] for value in parts)


def format_comparison(runs: Sequence[browse.RunRecord], width: int = 24) -> str:
    """Format three tables, with a column per run: config differences, curves, scores.

    width: bars per curve.
    """
    import io

    with extra("report", "the comparison of runs"):
        from rich.console import Console
        from rich.table import Table

    console = Console(file=io.StringIO(), width=max(100, 30 + (width + 14) * len(runs)), highlight=False)

    def table(title: str, cells: Sequence[Sequence[str]]) -> None:
        grid = Table("", *(run.name for run in runs), title=title, title_justify="left", box=None, pad_edge=False)
        for line in cells:
            grid.add_row(*line)
        if cells:
            console.print(grid, "", sep="\n")

    known = [run for run in runs if run.config]
    table(
        "Configs: keys that differ between runs",
        [[key, *map(_plain, values)] for key, values in browse.config_differences(known)],
    )
    curves = [browse.metric_curves(run.metrics_log, 10**9) for run in runs]
    names = sorted(
        {name for values in curves for name in values},
        key=lambda name: (name != "train/loss", name.startswith("perf/"), name),
    )
    table("Curves, and their last values", [[name, *_curve_cells(name, curves, width)] for name in names])
    numbers = [
        {key: value for key, value in flatten(run.metrics or {}).items() if browse.is_finite_number(value)}
        for run in runs
    ]
    scores = list(dict.fromkeys(key for values in numbers for key in values if "/" not in key and "." not in key))
    table("Numbers", [[key, *(_plain(values.get(key, "")) for values in numbers)] for key in scores])
    return console.file.getvalue()  # type: ignore[attr-defined]


def _curve_cells(name: str, curves: Sequence[dict[str, list[tuple[float, float]]]], width: int) -> list[str]:
    lines = [[y for _, y in values.get(name, ())] for values in curves]
    low, high = min(y for line in lines for y in line), max(y for line in lines for y in line)
    return [f"{sparkline(line, width, low, high)} {line[-1]:.4g}" if line else "" for line in lines]


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
