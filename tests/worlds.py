"""Many trainings one after another in the same processes, which have imported everything: a second each."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from smoke import command, here, port

PRELOAD = ["ldm.recipes.diffusion", "ldm.evaluation.evaluate", "hydra", "torchmetrics.image", "worlds", "sources"]


def rank_variables(launcher: str, rank: int, world: int) -> dict[str, str]:
    """Return the variables that torchrun, or Slurm's srun on one machine, sets for a process."""
    if world == 1:
        return {}
    address = {"MASTER_ADDR": "127.0.0.1"}
    if launcher == "slurm":
        tasks = {name: str(world) for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")}
        ids = {name: str(rank) for name in ("SLURM_PROCID", "SLURM_LOCALID")}
        return {**address, **tasks, **ids, "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "1",
                "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"}  # fmt: skip
    sizes = {name: str(world) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    ids = {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
    return {**address, **sizes, **ids, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}


def train_all(
    names: Sequence[str], root: Path, launcher: str = "torchrun", world: int = 1, wait: float = 900
) -> dict[str, str]:
    """Run `python train.py` on each config root/configs/NAME/config.yaml in the same `world` processes.

    wait: seconds in all.  Returns what failed: {name: output of all processes}.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    children, address = [], {"MASTER_PORT": str(port())}
    for rank in range(world):
        env = {**rank_variables(launcher, rank, world), **(address if world > 1 else {})}
        children.append(context.Process(target=_train, args=(names, root, env, rank)))
        children[-1].start()
    for child in children:
        child.join(wait)
        if child.is_alive():
            child.kill()
            child.join()
    codes = {name: [root / "codes" / f"{name}-{rank}" for rank in range(world)] for name in names}
    return {
        name: "\n".join((root / "printed" / f"{name}-{rank}.txt").read_text() for rank in range(world))
        for name, files in codes.items()
        if any(not file.is_file() or file.read_text() != "0" for file in files)
    }


def _train(names: Sequence[str], root: Path, env: Mapping[str, str], rank: int) -> None:
    import sources
    import torch

    from ldm.recipes import diffusion

    os.environ.update({**env, "TRACKIO_DIR": str(root / "trackio")})
    sources.replace_downloads(root / "data")
    diffusion.grid_samples = lambda *_: [torch.zeros(3, 8, 8)]  # sampling is not compared
    with here(root):
        for name in names:
            with open(root / "printed" / f"{name}-{rank}.txt", "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            try:
                code = command("train.py", "--config-path", str(root / "configs" / name), "--config-name", "config")
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            (root / "codes" / f"{name}-{rank}").write_text(str(code))
