"""What a second process is worth: a step of the quickstart's training, its batch shared by two processes, beside one."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pairs import HERE, Work, keep, told

TRAIN = HERE.parents[1] / "train.py"
BATCH = 128


def step(processes: int, threads: int, typed: tuple[str, ...]) -> float:
    """Seconds of a step, as the last record of a training has it."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("metrics=none", "logger=none", f"training.batch_size={BATCH}", f"runs={folder}/runs")
        words += (
            "trainer.accelerator=cpu",
            *(("trainer=ddp", f"trainer.devices={processes}") if processes > 1 else ()),
        )
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [sys.executable, str(TRAIN), *typed, *words], cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL
        )
        (run,) = Path(folder).glob("runs/*/metrics.jsonl")
        return (
            BATCH
            / [
                json.loads(line)["perf/images_per_s"]
                for line in run.read_text().splitlines()
                if "perf/images_per_s" in line
            ][-1]
        )


def measure(pairs: int, threads: int, typed: tuple[str, ...] = ("training.steps=120", "training.log_every=60")) -> None:
    found = [(step(2, threads, typed), step(1, threads, typed)) for _ in range(pairs)]
    work = Work("training step by two processes", "the quickstart, 128 images a step", "one process of as many threads")
    keep(told(work, threads, [two for two, _ in found], [one for _, one in found], ""))
