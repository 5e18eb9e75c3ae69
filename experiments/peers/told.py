"""The table and the figure of results.csv."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from ldm import durable
from ldm.report import table

WAYS = {"fd_fashion": "alone", "guided_fd_fashion": "with guidance"}
Row = Mapping[str, str]


def write(found: Sequence[Row], place: Path) -> None:
    """Put the table of a results.csv into the README beside it, and draw figure.png."""
    floor = next(float(row["fd_fashion"]) for row in found if row["who"] == "reconstructions")
    models = sorted((row for row in found if row["who"] != "reconstructions"), key=lambda row: int(row["seed"]))
    readme = place / "README.md"
    durable.write_text(readme, table.between(readme.read_text(), "table", "\n".join(lines(models, floor))))
    figure(models, floor, place / "figure.png")


def lines(models: Sequence[Row], floor: float) -> Iterable[str]:
    """Markdown: a line for each way of drawing and each of the minutes, distances by seed, and the ratio of what both have above floor."""
    yield "| drawn | CPU minutes | ours, by seed | diffusers, by seed | above the reconstructions' " + f"{floor:.2f}: ours / diffusers |"
    yield "|---|---|---|---|---|"
    for name, way in WAYS.items():
        for one in sorted({float(row["minutes"]) for row in models}):
            sides = [[row for row in models if row["who"] == who and float(row["minutes"]) == one] for who in ("ours", "diffusers")]
            if not all(sides):
                continue
            ours, theirs = ([float(row[name]) for row in side] for side in sides)
            cells = (", ".join(f"{value:.2f}" for value in side) for side in (ours, theirs))
            yield f"| {way} | {one:g} | {' | '.join(cells)} | **{(mean(ours) - floor) / (mean(theirs) - floor):.2f}** |"


def figure(models: Sequence[Row], floor: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, axis = plt.subplots(figsize=(5, 3.4))
    for who in ("ours", "diffusers"):
        for name, way in WAYS.items():
            points = [(float(row["minutes"]), float(row[name])) for row in models if row["who"] == who]
            xs = sorted({x for x, _ in points})
            style = "-" if name == "fd_fashion" else "--"
            (line,) = axis.plot(xs, [mean(y for a, y in points if a == x) for x in xs], style, label=f"{who}, {way}")
            axis.plot(*zip(*points, strict=True), ".", color=line.get_color())
    axis.axhline(floor, color="gray", lw=0.8, label="reconstructions")
    axis.set(xscale="log", yscale="log", xlabel="CPU minutes of training", ylabel="fd_fashion")
    axis.legend(fontsize=7)
    plot.tight_layout()
    plot.savefig(path, dpi=90)
    plt.close(plot)
