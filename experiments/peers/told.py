"""The table and the figure of results.csv."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from ldm.io import atomic
from ldm.report import table

WAYS = {"fd_fashion": "alone", "guided_fd_fashion": "with guidance"}
Row = Mapping[str, str]


def write(found: Sequence[Row], place: Path) -> None:
    """Put the table of a results.csv into the README beside it, and draw figure.png."""
    floor = next(float(row["fd_fashion"]) for row in found if row["who"] == "reconstructions")
    models = sorted((row for row in found if row["who"] != "reconstructions"), key=lambda row: int(row["seed"]))
    readme = place / "README.md"
    atomic.write_text(readme, table.replace_block(readme.read_text(), "table", "\n".join(lines(models, floor))))
    figure(models, floor, place / "figure.png")


def lines(models: Sequence[Row], floor: float) -> Iterable[str]:
    """Markdown: a line for each way of drawing, minutes and peer; distances by seed, and the ratio of what both have
    above floor.
    """
    above = f"above the reconstructions' {floor:.2f}: ours / the peer's"
    yield f"| drawn | CPU minutes | peer | ours, by seed | the peer's, by seed | {above} |"
    yield "|---|---|---|---|---|---|"
    for name, way in WAYS.items():
        shown = [row for row in models if row.get(name)]
        for one in sorted({float(row["minutes"]) for row in shown}):
            side = {
                who: [float(row[name]) for row in shown if (row["who"], float(row["minutes"])) == (who, one)]
                for who in names(shown)
            }
            for peer, theirs in side.items():
                if peer == "ours" or not theirs or not side.get("ours"):
                    continue
                cells = (", ".join(f"{value:.2f}" for value in values) for values in (side["ours"], theirs))
                ratio = (mean(side["ours"]) - floor) / (mean(theirs) - floor)
                yield f"| {way} | {one:g} | {peer} | {' | '.join(cells)} | **{ratio:.2f}** |"


def names(models: Sequence[Row]) -> list[str]:
    return sorted({row["who"] for row in models})


def figure(models: Sequence[Row], floor: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, axis = plt.subplots(figsize=(7, 3.4))
    for number, who in enumerate(names(models)):
        for name, way in WAYS.items():
            points = [
                (float(row["minutes"]), float(row[name])) for row in models if row["who"] == who and row.get(name)
            ]
            if not points:
                continue
            xs = sorted({x for x, _ in points})
            style = "-" if name == "fd_fashion" else "--"
            axis.plot(xs, [mean(y for a, y in points if a == x) for x in xs], style, color=f"C{number}")
            axis.plot(*zip(*points, strict=True), "." if len(xs) > 1 else "o", color=f"C{number}", ms=4)
            axis.plot([], [], style if len(xs) > 1 else "o", color=f"C{number}", ms=4, label=f"{who}, {way}")
    axis.axhline(floor, color="gray", lw=0.8, label="reconstructions")
    axis.set(xscale="log", yscale="log", xlabel="CPU minutes of training", ylabel="fd_fashion")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    plot.tight_layout()
    plot.savefig(path, dpi=90)
    plt.close(plot)
