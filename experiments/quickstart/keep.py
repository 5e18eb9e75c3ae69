"""Copy a finished run's scores and sample grid here and write them into experiments/README.md.

python experiments/quickstart/keep.py RUN
"""

import csv
import re
import shutil
import sys
from pathlib import Path

from ldm.io import atomic
from ldm.runs import metrics_log

HERE = Path(__file__).parent
COLUMNS = {
    "": "samples",
    "baseline/test/": "real test images",
    "baseline/noisy/": "the same, noise 0.05",
    "baseline/pca/": "PCA-50 Gaussian a class",
}
METRICS = ("fd_fashion", "kid_fashion", "accuracy", "precision", "recall")


def table(metrics: dict) -> str:
    """The scores as a markdown table."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS)]
    for name in METRICS:
        cells = [metrics.get(prefix + name) for prefix in COLUMNS]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.3g}" for c in cells) + " |")
    how = f"n = {metrics['n']}, guidance {metrics['guidance']} (chosen on other seeds), {metrics['steps']} steps, autoencoder rFD "
    return "\n".join([*lines, "", how + f"{metrics['first_stage/rfd_fashion']:.2f}."])


def main(run: str) -> None:
    """Copy scores and sample grid; write results.csv and the table in experiments/README.md."""
    folder = Path(run)
    metrics = metrics_log.read_final_metrics(folder)
    if metrics is None:
        sys.exit(f"error: {folder} is not a finished run")
    for name in ("metrics.json", "samples.png"):
        shutil.copy(folder / name, HERE / name)
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["metric", *COLUMNS.values()])
        writer.writeheader()
        for name in METRICS:
            writer.writerow(
                {"metric": name} | {title: metrics.get(prefix + name, "") for prefix, title in COLUMNS.items()}
            )
    readme = HERE.parent / "README.md"
    text = re.sub(
        r"(<!-- scores -->\n).*?(<!-- /scores -->)",
        lambda m: m[1] + table(metrics) + "\n" + m[2],
        readme.read_text(),
        flags=re.DOTALL,
    )
    atomic.write_text(readme, text)


if __name__ == "__main__":
    main(*sys.argv[1:])
