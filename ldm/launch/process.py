"""Run a composed config in its own process, on one device or on several under torchrun; no process runs two jobs."""

import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "LDM_WORLD", "LDM_RESULT"),
)

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def is_launched_rank() -> bool:
    """Return whether this process is one rank of a job that torchrun or Slurm started."""
    slurm = "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1
    return "LOCAL_RANK" in os.environ or slurm


def run_in_subprocess(script: Path, config_folder: Path, devices: int = 1, env: Mapping[str, str] | None = None) -> int:
    """Run `script` on config_folder/config.yaml in its own process group; return its exit code (128 + n for signal n).

    devices: ranks on this machine, started by torchrun if more than one.
    env: added to the environment, from which this process's rank variables are removed.
    SIGTERM, SIGINT and SIGUSR1 that arrive meanwhile are forwarded to every rank.
    """
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in RANK_VARIABLES and not key.startswith("TORCHELASTIC_")
    }
    config = ["--config-path", str(Path(config_folder).absolute()), "--config-name", "config"]
    with tempfile.TemporaryDirectory(prefix="ldm-world-") as world:
        clean |= {**(env or {}), "LDM_PARENT": str(os.getpid()), "LDM_WORLD": world}
        start = [sys.executable] if devices == 1 else [sys.executable, "-m", "ldm.launch.process", str(devices)]
        with _forward(Path(world)) as child:
            child.append(subprocess.Popen([*start, str(script), *config], env=clean, start_new_session=True))
            code = child[0].wait()
        codes = [int(file.read_text()) for file in Path(world).glob("*.code")]
    code = 128 - code if code < 0 else code
    return code or max(codes, default=0)  # a failed rank ends the others, which then exit in order with 0


@contextmanager
def _forward(world: Path) -> Iterator[list[subprocess.Popen]]:
    """Forward signals to the ranks that have reported a process id, else to the child; terminate the child on exit."""
    child: list[subprocess.Popen] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        ranks = [int(file.read_text() or 0) for file in world.glob("*.pid")]
        for process in ranks or [one.pid for one in child]:  # torchrun itself would kill the ranks after 30 s
            if process:
                _kill(process, number if ranks else signal.SIGTERM)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, pass_on) for number in FORWARDED_SIGNALS} if main else {}
    try:
        yield child
    finally:
        for one in child:
            if one.poll() is None:
                one.terminate()
                one.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill(process: int, number: int) -> bool:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def report_rank(world: Path) -> Iterator[None]:
    """Report one rank to run_in_subprocess: write its process id while it runs, and its exit code at the end.

    world: folder shared by the ranks of a job.
    A rank that ends in order (85 preempted, 130 interrupted) exits with 0, so that torchrun lets the others finish too.
    """
    rank = os.environ.get("RANK", "0")
    (world / f"{rank}.pid").write_text(str(os.getpid()))
    try:
        yield
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        (world / f"{rank}.code").write_text(str(code))
        raise SystemExit(0 if code in (85, 130) else code) from None
    finally:
        (world / f"{rank}.pid").unlink(missing_ok=True)


def exit_with_parent(parent: int, every: float = 2.0, grace: float = 60.0) -> None:
    """Wait until the process `parent` is gone, then end this one: SIGTERM, and SIGKILL after `grace` seconds."""
    while _kill(parent, 0):
        time.sleep(every)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def main(devices: str, script: str, *arguments: str) -> int:
    """Run torch.distributed.run on one machine and return the first failed rank's exit code, without its report."""
    logging.disable(logging.ERROR)  # the ranks have already printed what went wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(devices))))
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(["--standalone", "--nproc-per-node", devices, script, *arguments]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
