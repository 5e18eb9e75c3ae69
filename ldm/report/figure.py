"""Plot a study: its arms side by side, or one metric over another as lines."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ldm import plotting
from ldm.errors import UserError
from ldm.report import rows
from ldm.report.study import Arm, Study
from ldm.report.table import by_seed

COLOURS = (
    plotting.BLUE,
    plotting.RED,
    plotting.GREEN,
    plotting.YELLOW,
    plotting.PURPLE,
    plotting.SKY,
    plotting.SOFT,
    plotting.INK,
)
LOWER_IS_BETTER = ("fd_", "kid_", "nfe", "rfd_", "train/", "val/", "bits")  # prefixes of metric names


def write(study: Study, results: Sequence[rows.Row], path: Path) -> bool:
    """Write the figure of a study's rows to a PNG; return False if there is nothing to plot.

    Raises UserError without matplotlib.
    """
    if not any(rows.parse_number(row.get(metric)) is not None for row in results for metric in study.metrics):
        return False
    figure = plot_tradeoff(study, results) if study.figure else plot_arms(study, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=plotting.DPI, metadata={"Software": None})
    return True


def plot_arms(study: Study, results: Sequence[rows.Row]) -> Any:
    """Plot one panel per metric and one line per arm: a dot per seed, a bar at their mean."""
    arms = list(dict.fromkeys(study.arm(row) for row in results))
    metrics = [metric for metric in study.metrics if any(by_seed(study, arm, metric, results) for arm in arms)]
    labels = [" · ".join(cell or "–" for cell in arm) for arm in arms]
    left, wide, high = 12 + 7 * max(map(len, labels)), 250, 26 * len(arms)
    figure = plotting.canvas(left + (wide + 24) * len(metrics), high + 78)
    for i, metric in enumerate(metrics):
        axes = plotting.panel(figure, left + (wide + 24) * i, 28, wide, high, metric)
        for row, arm in enumerate(arms):
            values = list(by_seed(study, arm, metric, results).values())
            axes.plot(values, [-row] * len(values), "o", color=plotting.BLUE, ms=3.2, alpha=0.55, mew=0)
            if values:
                axes.plot([mean(values)] * 2, [-row - 0.28, -row + 0.28], color=plotting.INK, lw=1.4)
        axes.set(
            yticks=[-row for row in range(len(arms))],
            yticklabels=labels if i == 0 else [],
            ylim=(-len(arms) + 0.4, 0.6),
        )
        axes.grid(axis="x", color=plotting.PALE, lw=0.5)
        axes.set_axisbelow(True)
    plotting.words(figure, "one dot per seed, a bar at the mean", left, high + 66, plotting.SOFT, 11)
    return figure


def plot_tradeoff(study: Study, results: Sequence[rows.Row]) -> Any:
    """Plot y over x, as in study.yaml's `figure`, means over seeds; a ring marks points on the Pareto front."""
    x, y, key = study.figure["x"], study.figure["y"], study.figure.get("line")
    arms: dict[Arm, Sequence[rows.Row]] = {}
    for row in results:
        arms[study.arm(row)] = [*arms.get(study.arm(row), ()), row]
    points = {arm: (_mean(study, group, x), _mean(study, group, y)) for arm, group in arms.items()}
    lines: dict[str, list[Arm]] = {}
    for arm, group in arms.items():
        name = ", ".join(rows.format_cell(group[0].get(one)) or "–" for one in key.split(",")) if key else ""
        lines.setdefault(name, []).append(arm)
    figure = plotting.canvas(640, 376)
    axes = plotting.panel(figure, 62, 26, 380, 290, study.title, x=f"{x} (log)" if _is_log(points, 0) else x, y=y)
    for colour, (name, line) in zip(COLOURS * 4, lines.items(), strict=False):
        curve = [points[arm] for arm in line] if x in study.metrics else sorted(points[arm] for arm in line)
        axes.plot(*zip(*curve, strict=True), "-o", color=colour, lw=1.3, ms=3.4, label=name)
    front = (
        pareto(points, _less(x), _less(y)) if study.figure.get("front", x) and (_less(x) or x in study.metrics) else []
    )
    axes.plot(
        [points[arm][0] for arm in front],
        [points[arm][1] for arm in front],
        "o",
        ms=8.5,
        mfc="none",
        mec=plotting.INK,
        mew=0.9,
    )
    axes.set(xscale="log" if _is_log(points, 0) else "linear", yscale="log" if _is_log(points, 1) else "linear")
    axes.grid(color=plotting.PALE, lw=0.5)
    if _is_log(points, 0):
        ticks = sorted({point[0] for point in points.values()})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    named = ", ".join(one.split(".")[-1] for one in (key or "").split(","))
    if any(lines):
        legend = axes.legend(
            loc="upper left",
            bbox_to_anchor=(1.01, 1),
            frameon=False,
            fontsize=12 * plotting.POINT,
            title=named,
            alignment="left",
        )
        legend.get_title().set_fontsize(11 * plotting.POINT)
    plotting.words(
        figure,
        "means over seeds" + ("; ringed: no other point is better in both" if front else ""),
        62,
        354,
        plotting.SOFT,
        11,
    )
    return figure


def pareto(points: dict[Arm, tuple[float, float]], less_x: bool, less_y: bool) -> list[Arm]:
    """Return the arms that no other arm dominates; less_x, less_y: whether less is better."""
    signed = {arm: ((1 if less_x else -1) * x, (1 if less_y else -1) * y) for arm, (x, y) in points.items()}
    return [
        arm
        for arm, (x, y) in signed.items()
        if not any(a <= x and b <= y and (a, b) != (x, y) for other, (a, b) in signed.items() if other != arm)
    ]


def _less(name: str) -> bool:
    return name.startswith(LOWER_IS_BETTER)


def _mean(study: Study, group: Sequence[rows.Row], name: str) -> float:
    values = [value for row in group if (value := rows.parse_number(row.get(name))) is not None]
    if not values:
        raise UserError(f"{study.folder}: figure: {', '.join(study.arm(group[0]))} has no number {name}")
    return mean(values)


def _is_log(points: dict[Arm, tuple[float, float]], axis: int) -> bool:
    values = [point[axis] for point in points.values()]
    return min(values) > 0 and max(values) / min(values) >= 6
