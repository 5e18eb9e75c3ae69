"""The GPUs of this machine, shared out among jobs: each is held by one at a time, whoever started it."""

import getpass
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ldm.errors import UserError

IDLE = 1024  # MiB in use on a GPU that nobody works on: what a screen or a driver holds


def idle_gpus() -> tuple[str, ...]:
    """The ids of the GPUs that nobody uses, of those that CUDA_VISIBLE_DEVICES leaves. Raises UserError where there is none."""
    remedy = "hydra/launcher=joblib runs hydra.launcher.n_jobs=N jobs at once without; or leave it out, for one after another"
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        raise UserError(f"hydra/launcher=gpus: nvidia-smi finds no GPU on this machine; {remedy}") from None
    found = [tuple(word.strip() for word in line.split(",")) for line in listed.splitlines() if line.strip()]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [one for one in found if allowed is None or {one[0], one[1]} & set(allowed.split(","))]
    idle = tuple(uuid for _, uuid, used in seen if used.isdigit() and int(used) < IDLE)
    if not idle:
        raise UserError(f"hydra/launcher=gpus: all of the {len(seen)} GPUs here are in use; wait, or {remedy}")
    return idle


@contextmanager
def acquire_gpus(gpus: Sequence[str], number: int = 1, every: float = 0.2) -> Iterator[dict[str, str]]:
    """Wait for `number` of the GPUs, and hold them; gives the environment that pins a process to them, for no GPUs at all nothing.

    Raises UserError for more than there are.
    """
    from filelock import FileLock, Timeout

    if not gpus:
        yield {}
        return
    if number > len(gpus):
        raise UserError(f"trainer.devices={number}: hydra/launcher=gpus has {len(gpus)} free here")
    folder = Path(tempfile.gettempdir()) / f"ldm-gpus-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    while True:
        with ExitStack() as stack:
            mine: list[str] = []
            with FileLock(folder / "choosing"):  # one at a time, so that no two hold half of what each waits for
                for gpu in gpus:
                    if len(mine) == number:
                        break
                    try:
                        stack.enter_context(FileLock(folder / gpu, timeout=0))
                        mine.append(gpu)
                    except Timeout:
                        continue
            if len(mine) == number:
                yield {"CUDA_VISIBLE_DEVICES": ",".join(mine)}
                return
        time.sleep(every)
