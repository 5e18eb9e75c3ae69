"""Whether the class that was asked for is drawn, as a judge sees it who saw real images alone: python
experiments/cifar10/measure.py RUN

Writes results.csv and samples.png here; draws through sample.py, into the run.
"""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.load import load_model, load_run_config
from ldm.config import build
from ldm.io.images import make_grid, save_png, to_uint8
from ldm.metrics.distribution import frechet
from ldm.metrics.effnet import EfficientNet
from ldm.metrics.features import extract
from ldm.metrics.interval import wilson

HERE = Path(__file__).parent
SAMPLE = HERE.parents[1] / "sample.py"
NUM, TAUGHT = 2000, 10_000
SCALES = (1.0, 2.0, 4.0)


def main(run: str) -> None:
    torch.set_num_threads(1)
    config = load_run_config(Path(run))
    data, test = build.build_dataset(config), build.build_dataset(config, "test")
    net = EfficientNet()
    features = extract(net, (data.pixels(range(i, i + 500)) for i in range(0, TAUGHT, 500)))
    judge = ridge(features, 2 * torch.nn.functional.one_hot(data.labels[:TAUGHT], 10).float() - 1)
    reference = gaussian(features)
    results = []

    def add(way: str, images: Tensor, label: Tensor, scale: float | None = None) -> None:
        seen = extract(net, images.split(200))
        hits = int((judge(seen).argmax(1) == label).sum())
        low, high = wilson(hits, len(label))
        found: dict[str, Any] = {
            "images": way,
            "guidance": scale,
            "n": len(label),
            "accuracy": round(hits / len(label), 4),
        }
        found |= {"accuracy_low": round(low, 4), "accuracy_high": round(high, 4)}
        results.append(found | {"fd_effnet": round(float(frechet(*reference, *gaussian(seen))), 1)})
        print(results[-1], flush=True)

    real, label = test.pixels(range(NUM)), test.labels[:NUM]
    add("real", real, label)
    with torch.no_grad():
        model = load_model(run)
        add(
            "real, through the first stage",
            torch.cat([model.decode(model.encode(x)).clamp(-1, 1) for x in real.split(200)]),
            label,
        )
    for scale in SCALES:
        images = drawn(run, scale)
        add("drawn", images, torch.arange(NUM) % 10, scale)
        if scale == SCALES[1]:
            rows = [column * 10 + kind for kind in range(10) for column in range(12)]
            save_png(HERE / "samples.png", make_grid(to_uint8(images[rows]), 12))
    with open(HERE / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


def drawn(run: str, scale: float) -> Tensor:
    """NUM images (N, 3, 32, 32) in [-1, 1] by `python sample.py`, of class i mod 10 for image i."""
    out = Path(run) / "measured" / f"{scale:g}"
    how = (
        "sampler=dpmpp_2m",
        "steps=20",
        "guidance=cfg",
        f"guidance.scale={scale}",
        f"num={NUM}",
        "batch_size=100",
        "seed=1000",
    )
    subprocess.run(
        [sys.executable, str(SAMPLE), f"run={run}", f"output_dir={out}", *how], check=True, stdout=subprocess.DEVNULL
    )
    files = sorted(out.glob("[0-9]*.png"))
    return (
        torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]).float() / 127.5
        - 1
    )


def ridge(x: Tensor, y: Tensor):
    """The linear map from x (N, D), standardised, to y (N, E) with the least squared error and N / 10 on its size."""
    std, mean = torch.std_mean(x, 0)
    z = ((x - mean) / (std + 1e-6)).double()
    inner = z.T @ z + len(x) / 10 * torch.eye(x.shape[1], dtype=torch.float64)
    map_, offset = torch.linalg.solve(inner, z.T @ (y - y.mean(0)).double()).float(), y.mean(0)
    return lambda other: (other - mean) / (std + 1e-6) @ map_ + offset


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D) in float64."""
    return features.double().mean(0), features.double().T.cov()


if __name__ == "__main__":
    main(*sys.argv[1:])
