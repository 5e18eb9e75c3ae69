"""Share the GPUs of this machine among jobs: a lock per GPU lets one job use it at a time, whoever started it."""

import getpass
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ldm.errors import UserError

IDLE = 1024  # MiB in use on an idle GPU: what a display or the driver may take


def idle_gpus() -> tuple[str, ...]:
    """Return the UUIDs of the unused GPUs among those in CUDA_VISIBLE_DEVICES.  Raises UserError if there is none."""
    remedy = (
        "hydra/launcher=joblib runs hydra.launcher.n_jobs=N jobs at once without GPUs; "
        "or leave it out to run one after another"
    )
    query = ["nvidia-smi", "--query-gpu=index,uuid,memory.used", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        raise UserError(f"hydra/launcher=gpus: nvidia-smi finds no GPU on this machine; {remedy}") from None
    rows = [tuple(word.strip() for word in line.split(",")) for line in output.splitlines() if line.strip()]
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [row for row in rows if allowed is None or {row[0], row[1]} & set(allowed.split(","))]
    idle = tuple(uuid for _, uuid, used in visible if used.isdigit() and int(used) < IDLE)
    if not idle:
        raise UserError(f"hydra/launcher=gpus: all {len(visible)} GPUs of this machine are in use; wait, or {remedy}")
    return idle


@contextmanager
def acquire_gpus(gpus: Sequence[str], number: int = 1, every: float = 0.2) -> Iterator[dict[str, str]]:
    """Wait for `number` of the GPUs and lock them while the block runs.

    every: seconds between attempts.  Yields the environment that pins a process to them; empty if `gpus` is empty.
    Raises UserError if there are fewer than `number`.
    """
    from filelock import FileLock, Timeout

    if not gpus:
        yield {}
        return
    if number > len(gpus):
        raise UserError(f"trainer.devices={number}: hydra/launcher=gpus has {len(gpus)} idle GPUs on this machine")
    folder = Path(tempfile.gettempdir()) / f"ldm-gpus-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    while True:
        with ExitStack() as stack:
            acquired: list[str] = []
            # One process chooses at a time, so that no two hold half of what each waits for.
            with FileLock(folder / "choosing"):
                for gpu in gpus:
                    if len(acquired) == number:
                        break
                    try:
                        stack.enter_context(FileLock(folder / gpu, timeout=0))
                        acquired.append(gpu)
                    except Timeout:
                        continue
            if len(acquired) == number:
                yield {"CUDA_VISIBLE_DEVICES": ",".join(acquired)}
                return
        time.sleep(every)
