"""How a command fails: one line for a mistake of the user, a traceback for a bug."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.errors import NonFiniteError, UserError

DISK_ERRNOS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
)  # full, or not ours to write


def run_guarded(run: Callable[[], Any]) -> int:
    """The exit code of run(), its mistakes printed in one line."""
    try:
        return int(run() or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        said, code = (str(error), 3) if isinstance(error, NonFiniteError) else (user_error_message(error), 2)
        if said is None or "LDM_TRACEBACK" in os.environ:
            trace = error.__traceback__
            ours = (__file__, str(Path(__file__).with_name("sweep.py")))
            while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in ours:
                trace = trace.tb_next  # from the task on
            traceback.print_exception(type(error), error, trace)
        if said is None:
            return 1
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {' '.join(said.split())}", file=sys.stderr)
        return code


def describe_overflow(error: BaseException) -> str | None:
    """What torch says in many words of a size beyond its numbers or this machine's memory, in few; None of anything else."""
    said = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in said or "not enough memory" in said:
        return "too large for this machine's memory"
    return "a number is too large" if "verflow" in said else None


def user_error_message(error: BaseException) -> str | None:
    """The text of an error a person can mend, None for a bug."""
    if isinstance(error, UserError | FileNotFoundError) or (isinstance(error, OSError) and error.errno in DISK_ERRNOS):
        return str(error)
    cause = error.__cause__
    if (
        type(error).__name__ == "InstantiationException" and cause is not None
    ):  # Hydra's, around what a constructor raised
        said = describe_overflow(cause) or user_error_message(cause)
        key = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
        return f"{said} (in {key[1]})" if said and key else said
    return None
