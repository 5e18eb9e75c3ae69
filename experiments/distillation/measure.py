"""Students of the quickstart's model at 16 to 1 steps, beside it: python experiments/distillation/measure.py RUN [NUM]

Trains progressive students (32 steps of the guided teacher to 16, 8, 4, 2) and a consistency student, each by a
command, and draws from all
of them. Goes on where it stopped; a row of results.csv a way of drawing, figure.png of them all. NUM: images each
(2,000).
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ldm.report import rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GUIDED = ("guidance=cfg_interval", "guidance.scale=5.0")
CONSISTENCY = ("objective=consistency", "sampler=consistency", "objective.steps=16")
SHOWN = {"scale": "5.0", "interval": "[0.2,0.75]"}  # how the teacher is guided, as the quickstart chose it


def main(run: str, num: str = "2000") -> None:
    teacher = Path(run).absolute()
    for steps in (50, 16, 8, 4, 2):
        drawn(teacher, "teacher", steps, int(num), "sampler=ddim", "timestep_spacing=uniform", *GUIDED)
    student = teacher
    for steps in (16, 8, 4, 2):
        student = trained(
            teacher, f"progressive {steps}", student, f"objective.steps={steps}", *shown(student == teacher)
        )
        drawn(
            student,
            "progressive",
            steps,
            int(num),
            "sampler=ddim",
            "timestep_spacing=uniform",
            "guidance=cfg",
            of=teacher,
        )
    student = trained(teacher, "consistency", teacher, *CONSISTENCY, *shown(True))
    for steps in (1, 2, 4):
        drawn(
            student,
            "consistency",
            steps,
            int(num),
            "sampler=consistency",
            "timestep_spacing=uniform",
            "guidance=cfg",
            of=teacher,
        )
    figure(rows.read(HERE / "results.csv"))


def shown(first: bool) -> tuple[str, ...]:
    """The teacher is guided; a student that teaches has that in it."""
    return tuple(f"objective.teacher.{name}={value}" for name, value in SHOWN.items()) if first else ()


def trained(teacher: Path, name: str, begun: Path, *typed: str) -> Path:
    """The run of a student, trained now unless it is."""
    runs = teacher.parent / "students" / teacher.name / name.replace(" ", "-")
    asked = (
        f"init={begun}",
        f"objective.teacher.run={begun}",
        f"runs={runs}",
        f"seed={teacher.name.rsplit('-s', 1)[-1]}",
    )
    command = [sys.executable, str(ROOT / "train.py"), "experiment=distillation", *typed, *asked]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (folder,) = (file.parent for file in runs.glob("*/metrics.json"))
    return folder


def drawn(run: Path, way: str, steps: int, num: int, *typed: str, of: Path | None = None) -> None:
    """Draw and score `num` images, unless a row of results.csv has them."""
    table = HERE / "results.csv"
    seed = (of or run).name.rsplit("-s", 1)[-1]
    if any(
        (row["way"], row["steps"], row["seed"], row["n"]) == (way, str(steps), seed, str(num))
        for row in rows.read(table)
    ):
        return
    out = run / "distilled" / f"{way}-{steps}-{num}"
    asked = (
        f"run={run}",
        f"output_dir={out}",
        f"steps={steps}",
        f"num={num}",
        "seed=5000000",
        "batch_size=250",
        "save=grid",
        "metrics=full",
    )
    start = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "sample.py"), *asked, *typed], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((out / "metrics.json").read_text())
    row: dict[str, Any] = {
        "way": way,
        "steps": steps,
        "evaluations": steps * (2 if way == "teacher" else 1),
        "seed": seed,
        "n": num,
    }
    row |= {name: round(found[name], 4) for name in ("fd_fashion", "kid_fashion", "precision", "recall", "accuracy")}
    row |= {"seconds": round(time.monotonic() - start, 1)}
    print(row, flush=True)
    rows.append(table, row)


def figure(found: list[dict[str, str]]) -> None:
    """Distance against evaluations an image, a line a way, its seeds as points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plot, axis = plt.subplots(figsize=(5, 3.4))
    for way in dict.fromkeys(row["way"] for row in found):
        points = sorted((int(row["evaluations"]), float(row["fd_fashion"])) for row in found if row["way"] == way)
        xs = sorted({x for x, _ in points})
        line = axis.plot(
            xs, [sum(y for a, y in points if a == x) / sum(a == x for a, _ in points) for x in xs], label=way
        )[0]
        axis.plot(*zip(*points, strict=True), ".", color=line.get_color())
    axis.set(xscale="log", yscale="log", xlabel="evaluations an image", ylabel="fd_fashion")
    axis.legend(frameon=False)
    plot.tight_layout()
    plot.savefig(HERE / "figure.png", dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
