"""The quickstart's model drawn without guidance, with CFG and with the classifier, at as many evaluations an image.

python experiments/classifier_guidance/measure.py RUN CLASSIFIER writes results.csv here, a row a way, and goes on where it stopped.  Each
way's scale is the one of lowest distance on DEV images of other seeds.  An evaluation is one of the network, or one of the classifier with
its gradient.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ldm.metrics.interval import wilson
from ldm.report import rows

HERE = Path(__file__).parent
SAMPLE = HERE.parents[1] / "sample.py"
NUM, DEV, NFE = 1000, 500, 24


def ways(classifier: str) -> list[tuple[str, tuple[float, ...], int, tuple[str, ...]]]:
    """(name, scales to choose from, evaluations a step, what is typed)."""
    guided = ("guidance=classifier", f"guidance.classifier={classifier}")
    return [
        ("none", (1.0,), 1, ("guidance=cfg",)),
        ("cfg", (1.5, 2.0, 3.0), 2, ("guidance=cfg",)),
        ("cfg in an interval", (2.0, 3.0, 4.0), 2, ("guidance=cfg_interval",)),
        ("classifier", (0.5, 1.0, 2.0, 4.0), 2, guided),
        ("classifier everywhere", (1.0,), 2, (*guided, "guidance.interval=[0,1]")),
    ]


def main(run: str, classifier: str) -> None:
    file = HERE / "results.csv"
    for name, scales, each, typed in ways(classifier):
        if name in {row["guidance"] for row in rows.read(file)}:
            continue
        way = (run, name, each, typed)
        tried = {scale: drawn(*way, scale, DEV, 6_000_000)["fd_fashion"] for scale in (scales if len(scales) > 1 else ())}
        scale = min(tried, key=tried.__getitem__) if tried else scales[0]
        found = drawn(*way, scale, NUM, 5_000_000)
        low, high = wilson(round(found["accuracy"] * NUM), NUM)
        numbers = {key: round(found[key], 4) for key in ("fd_fashion", "kid_fashion", "precision", "recall", "accuracy")}
        row: dict[str, Any] = {"guidance": name, "scale": scale, "steps": NFE // each, "n": NUM, **numbers}
        row |= {"accuracy_low": round(low, 4), "accuracy_high": round(high, 4)}
        row |= {"fd_dev": " ".join(f"{scale:g}:{distance:.2f}" for scale, distance in tried.items())}
        print(row, flush=True)
        rows.add(file, row)


def drawn(run: str, name: str, each: int, typed: tuple[str, ...], scale: float, num: int, seed: int) -> dict[str, Any]:
    """The numbers of `num` images drawn one way."""
    out = Path(run) / "guided" / f"{name.replace(' ', '_')}-{scale:g}-{num}"
    how = ("sampler=dpmpp_2m", f"steps={NFE // each}", f"num={num}", f"seed={seed}", "batch_size=250", "save=none", "metrics=full")
    asked = [f"run={run}", f"out={out}", *how, *typed, f"guidance.scale={scale}"]
    subprocess.run([sys.executable, str(SAMPLE), *asked], check=True, stdout=subprocess.DEVNULL)
    return json.loads((out / "metrics.json").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
