"""How long a command takes to begin: CPU seconds of --help and --cfg job, wall seconds to the first step beside a plain
script's.
"""

import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from pairs import HERE, Work, keep, told

ROOT = HERE.parents[1]
PLAIN = HERE / "plain_lightning.py"


def run(*words: str, cwd: Path | str = ROOT) -> float:
    """Runs a python script; CPU seconds. Raises CalledProcessError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], cwd=cwd, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step(script: Path, *words: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(str(HERE / "first_step.py"), str(script), *words, cwd=folder)


def measure(pairs: int, threads: int) -> None:
    """--help and --cfg job against nothing but their limit; `python train.py` with first stage, judge and latents
    cached.
    """
    train = ROOT / "train.py"
    for words in (("--help",), ("--cfg", "job")):
        cpu = [run(str(train), *words) for _ in range(pairs + 1)][1:]
        keep(told(Work(f"train.py {' '.join(words)}, CPU time", "", "target 0.4 s"), threads, cpu, [0.4] * pairs, ""))
    ours, theirs = partial(first_step, train, "logger=none"), partial(first_step, PLAIN)
    found: tuple[list[float], list[float]] = ([], [])
    for way in (ours, theirs):
        way()  # pages and caches are warm from here on
    for _ in range(pairs):
        for side, way in enumerate((ours, theirs)):
            start = time.perf_counter()
            way()
            found[side].append(time.perf_counter() - start)
    keep(
        told(
            Work("start to first step", "quickstart, everything cached", "Lightning, torchmetrics, open_clip script"),
            threads,
            *found,
            "",
        )
    )
