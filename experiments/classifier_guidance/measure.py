"""The quickstart's model drawn without guidance, with CFG and with the classifier, at as many evaluations an image.

python experiments/classifier_guidance/measure.py RUN CLASSIFIER writes results.csv here.  An evaluation is one of the network, or one of
the classifier with its gradient.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ldm.metrics.interval import wilson

HERE = Path(__file__).parent
SAMPLE = HERE.parents[1] / "sample.py"
NUM, NFE = 500, 24


def ways(classifier: str) -> list[tuple[str, float, int, tuple[str, ...]]]:
    """(name, scale, evaluations a step, what is typed)."""
    guided = ("guidance=classifier", f"guidance.classifier={classifier}")
    return [
        ("none", 1.0, 1, ("guidance=cfg",)),
        *(("cfg", scale, 2, ("guidance=cfg",)) for scale in (2.0,)),
        *(("cfg in an interval", scale, 2, ("guidance=cfg_interval",)) for scale in (5.0,)),
        *(("classifier", scale, 2, guided) for scale in (1.0, 4.0)),
        ("classifier, the network's evaluations alone counted", 4.0, 1, guided),
    ]


def main(run: str, classifier: str) -> None:
    results = [drawn(run, *way) for way in ways(classifier)]
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


def drawn(run: str, name: str, scale: float, each: int, typed: tuple[str, ...]) -> dict[str, Any]:
    """The numbers of NUM images drawn one way."""
    out = Path(run) / "guided" / f"{name.split(',')[0].replace(' ', '_')}-{scale:g}-{each}"
    how = ("sampler=dpmpp_2m", f"steps={NFE // each}", f"num={NUM}", "seed=5000000", "batch_size=250", "save=none", "metrics=full")
    asked = [f"run={run}", f"out={out}", *how, *typed, f"guidance.scale={scale}"]
    subprocess.run([sys.executable, str(SAMPLE), *asked], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((out / "metrics.json").read_text())
    low, high = wilson(round(found["accuracy"] * NUM), NUM)
    numbers = {key: round(found[key], 4) for key in ("fd_fashion", "kid_fashion", "precision", "recall", "accuracy")}
    row = {"guidance": name, "scale": scale, "steps": NFE // each, "n": NUM, **numbers}
    row |= {"accuracy_low": round(low, 4), "accuracy_high": round(high, 4)}
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main(*sys.argv[1:])
