"""Whole trainings in processes of their own to which something may be done, forked from one that has imported
everything.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS = ("ldm.recipes.diffusion", "ldm.recipes.autoencoder", "ldm.evaluation.evaluate", "hydra", "torchmetrics.image")
After = Callable[[int, int], None]
Prepare = Callable[[], None]


def run(
    typed: tuple[str, ...],
    folder: Path,
    world: int = 1,
    after: After | None = None,
    wait: float = 300,
    prepare: Prepare | None = None,
) -> list[int]:
    """The exit codes of the ranks of `python train.py TYPED` in `folder`, at most `wait` seconds each; below 0, the
    signal that ended one.

    after: (rank, step) -> None, called in the training process when a step is done.  prepare: called in each process
    before the training.  What they print is in said-RANK.txt.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(OURS))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"LDM_CACHE": str(folder / "cache"), "LDM_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(world):
        if world > 1:
            env |= {
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "GROUP_RANK": "0",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults"}
        children.append(context.Process(target=_rank, args=(typed, folder, dict(env), rank, after, prepare)))
        children[-1].start()
    for child in children:
        child.join(wait)
        if child.is_alive():  # it should have left by itself
            child.kill()
            child.join()
    return [child.exitcode or 0 for child in children]


def _rank(
    typed: tuple[str, ...],
    folder: Path,
    env: dict[str, str],
    rank: int,
    after: After | None,
    prepare: Prepare | None,
) -> None:
    os.environ.update(env)
    os.chdir(folder)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of those that read data, as where a person starts the command
    with open(folder / f"said-{rank}.txt", "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare()
    if after is not None:
        _watch(rank, after)
    sys.argv = [str(ROOT / "train.py"), *typed]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _watch(rank: int, after: After) -> None:
    from ldm.training.callbacks import MetricsRecorder

    record = MetricsRecorder.on_train_batch_end

    def then(self: Any, trainer: Any, lit: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        record(self, trainer, lit, outputs, batch, batch_idx)
        after(rank, batch["step"] + 1)

    MetricsRecorder.on_train_batch_end = then
