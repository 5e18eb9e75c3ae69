"""Train, sample and score molecules in space: python experiments/molecules/atoms.py [runs=runs/qm9] [steps=20000]
[num=1000] [key=value ...]

Trains experiment=molecules/qm9, writes atoms.csv, with held-out molecules beside those sampled, and atoms.png.  What is
there is not computed again: started again, it goes on.  Other words go to train.py.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.load import load_model, load_run_config
from ldm.config import build
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import dpmpp_2m
from ldm.io import atomic
from ldm.io.atoms import from_sample
from ldm.io.images import save_png
from ldm.media.atoms import sheet
from ldm.metrics.stability import stability
from ldm.report import rows
from ldm.sampling.tasks import sample

HERE = Path(__file__).parent
TABLE = HERE / "atoms.csv"
TRAIN = HERE.parents[1] / "train.py"
STEPS, BATCH, SHOWN = 50, 250, 24  # of the sampler; samples at a time; molecules of the figure, the first


def main(*words: str) -> None:
    torch.set_num_threads(1)
    options = {"runs": "runs/qm9", "steps": "20000", "num": "1000"}
    more = [word for word in words if word.partition("=")[0] not in options]
    options |= dict(word.split("=", 1) for word in words if word not in more)
    folder, num = Path(options["runs"]), int(options["num"])
    command = [sys.executable, str(TRAIN), "experiment=molecules/qm9", f"runs={folder}"]
    subprocess.run([*command, f"training.steps={options['steps']}", *more], check=True)
    (run,) = (file.parent for file in folder.glob("*/metrics.json"))
    data = build.build_dataset(load_run_config(run), "test")
    held_out = data.pixels([i * len(data) // min(num, len(data)) for i in range(min(num, len(data)))])
    found = sampled(run, num)
    table = [
        {"molecules": "held out", **stability([from_sample(x) for x in held_out])},
        {"molecules": "sampled", "steps": options["steps"], **stability([from_sample(x) for x in found])},
    ]
    rows.write(TABLE, table)
    for row in table:
        print("  ".join(f"{name} {rows.format_cell(value)}" for name, value in row.items()), flush=True)
    save_png(HERE / "atoms.png", ((sheet(list(found[:SHOWN]), 8) + 1) * 127.5).round().byte())


def sampled(run: Path, num: int) -> Any:
    """Return samples (num, 8, 29), drawn once."""
    file = run / "measured" / f"{num}.safetensors"
    if not file.is_file():
        model = load_model(run)
        ts = trailing(model.denoiser.schedule, STEPS)
        parts = [sample(model, {"index": part}, part, ts, dpmpp_2m, partial(cfg, scale=1.0)) for part in batches(num)]
        atomic.write_tensors(file, {"samples": torch.cat(parts).float()})
    return atomic.read_tensors(file)["samples"]


def batches(num: int) -> list[list[int]]:
    return [part.tolist() for part in torch.arange(num).split(BATCH)]


if __name__ == "__main__":
    main(*sys.argv[1:])
