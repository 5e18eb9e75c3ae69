"""Does a training that is killed lose anything? python experiments/faults/kill.py [kills]

Each kill is a SIGKILL at a random moment of a tiny training (autoencoder with its GAN, or diffusion; 0 or 2 processes
that read; 1 or 2
processes that train; 1 or 2 batches a step) on synthetic data; of two processes one is killed and the other must leave
by itself. The same
command is then given again, and its losses, weights, their average and both optimisers' states are compared, bit for
bit, with those of the
same training never killed. A row of kill.csv a kill; those that are there are not repeated. Exits with 1 if anything
ever differs.
"""

import csv
import itertools
import os
import random
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from training_processes import run  # beside this file

HERE = Path(__file__).parent
WORK = Path("runs/faults").absolute()
STEPS, EVERY = 12, 4
SIZES = (
    f"training.steps={STEPS}",
    f"training.save_every={EVERY}",
    "training.log_every=1",
    "training.sample_every=100",
    "metrics=none",
)
STAGES = {
    "diffusion": ("budget=smoke", *SIZES),
    "autoencoder": (
        *(
            "budget=smoke",
            "training=autoencoder",
            "~training.score",
            "training.batch_size=8",
            "training.discriminator_start=3",
            *SIZES,
        ),
    ),
}
KINDS = list(itertools.product(STAGES, (0, 2), (1, 2), (1, 2)))  # stage, workers, world, accumulate


def command(stage: str, workers: int, world: int, accumulate: int) -> tuple[str, ...]:
    trainer = ("trainer=cpu",) if world == 1 else ("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32")
    return (*STAGES[stage], *trainer, f"trainer.num_workers={workers}", f"trainer.accumulate_grad_batches={accumulate}")


def prepared(name: str) -> Path:
    """A fresh folder whose cache has a first stage."""
    folder, cache = WORK / name, WORK / "cache"
    if not (cache / "done").is_file():
        shutil.rmtree(WORK, ignore_errors=True)
        cache.parent.mkdir(parents=True)
        first = ("budget=smoke", "training.steps=1", "metrics=none", "trainer=cpu", "runs=first")
        assert run(first, WORK) == [0], (WORK / "said-0.txt").read_text()
        (cache / "done").touch()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(cache, folder / "cache")
    return folder


def state(folder: Path) -> dict[str, Any]:
    """What a run ends with: its losses, and all that its last checkpoint holds."""
    from ldm.checkpoint.step import load_checkpoint
    from ldm.runs import metrics_log

    (step,) = folder.rglob(f"checkpoints/step-{STEPS:08d}")
    kept = load_checkpoint(step)
    rows = [
        {key: row[key] for key in row if key[:6] == "train/"}
        for row in metrics_log.read_metrics_log(step.parents[1] / "metrics.jsonl")
    ]
    return {
        "losses": rows,
        "weights": kept.tensors["model"],
        "average": kept.tensors["ema"],
        "optimisers": kept.state["optimizers"],
    }


def same(one: Any, two: Any) -> bool:
    """Whether nested data is equal, tensors bit for bit."""
    import torch

    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return len(one) == len(two) and all(map(same, one, two)) if isinstance(one, list | tuple) else one == two


def baseline(kind: tuple) -> dict[str, Any]:
    folder = WORK / "whole" / "-".join(map(str, kind))
    if not list(folder.rglob(f"checkpoints/step-{STEPS:08d}")):
        folder = prepared(f"whole/{folder.name}")
        codes = run(command(*kind), folder, kind[2])
        assert codes == [0] * kind[2], (folder / "said-0.txt").read_text()
    return state(folder)


def kill(rank: int, step: int, seconds: float, here: int, now: int) -> None:
    """SIGKILL to `rank`, so long after that step."""
    if (here, now) == (rank, step):
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def killed(number: int) -> dict[str, Any]:
    """One kill and what became of it."""
    draw = random.Random(number)
    kind = KINDS[(5 * number + number // len(KINDS)) % len(KINDS)]
    stage, workers, world, accumulate = kind
    rank, step, delay = draw.randrange(world), draw.randint(1, STEPS - 1), draw.uniform(0, 0.2)
    whole, folder = baseline(kind), prepared("killed")
    begin = time.monotonic()
    codes = run(command(*kind), folder, world, partial(kill, rank, step, delay))
    left = time.monotonic() - begin
    row = {
        "kill": number,
        "stage": stage,
        "workers": workers,
        "world": world,
        "accumulate": accumulate,
        "rank": rank,
        "step": step,
    }
    row |= {"delay_ms": round(1000 * delay), "codes": " ".join(map(str, codes)), "seconds": round(left, 1)}
    assert codes[rank] == -9, (codes, (folder / "said-0.txt").read_text()[-2000:])
    assert 0 not in codes, codes
    again = run(command(*kind), folder, world)
    assert again == [0] * world, (folder / "said-0.txt").read_text()[-3000:]
    said = [word for word in (folder / "said-0.txt").read_text().splitlines() if "resuming from step" in word]
    row["resumed_from"] = int(said[-1].split()[3]) if said else 0
    end = state(folder)
    return row | {name: "equal" if same(end[name], whole[name]) else "DIFFERENT" for name in whole}


def main(kills: int) -> int:
    table = HERE / "kill.csv"
    rows = list(csv.DictReader(table.open())) if table.is_file() else []
    for number in range(len(rows), kills):
        row = killed(number)
        new = not table.is_file()
        with table.open("a", newline="") as file:
            out = csv.DictWriter(file, row)
            if new:
                out.writeheader()
            out.writerow(row)
        rows.append(row)
        print(row, flush=True)
    different = [row for row in rows if "DIFFERENT" in row.values()]
    print(f"{len(rows)} kills, {len(different)} runs that differ from the one never killed")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else 30))
