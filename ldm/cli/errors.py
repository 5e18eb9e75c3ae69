"""Report a command's errors: one line for a user error, a traceback for a bug."""

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
)  # disk full, or no permission to write


def run_guarded(run: Callable[[], Any]) -> int:
    """Return the exit code of `run()`: 0 success, 1 bug, 2 user error (printed as one line), 3 non-finite numbers."""
    try:
        return int(run() or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message, code = (str(error), 3) if isinstance(error, NonFiniteError) else (user_error_message(error), 2)
        if message is None or "LDM_TRACEBACK" in os.environ:
            trace = error.__traceback__
            ours = (__file__, str(Path(__file__).with_name("sweep.py")))
            while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in ours:
                trace = trace.tb_next  # skip the command's own frames
            traceback.print_exception(type(error), error, trace)
        if message is None:
            return 1
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {' '.join(message.split())}", file=sys.stderr)
        return code


def describe_overflow(error: BaseException) -> str | None:
    """Describe an allocation or integer overflow error of torch in a few words; None for any other error."""
    message = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in message or "not enough memory" in message:
        return "too large for this machine's memory"
    return "a number is too large" if "verflow" in message else None


def user_error_message(error: BaseException) -> str | None:
    """Return the message of an error that the user can fix; None for a bug."""
    if isinstance(error, UserError | FileNotFoundError) or (isinstance(error, OSError) and error.errno in DISK_ERRNOS):
        return str(error)
    cause = error.__cause__
    if (
        type(error).__name__ == "InstantiationException" and cause is not None
    ):  # Hydra's wrapper of a constructor's error
        message = describe_overflow(cause) or user_error_message(cause)
        key = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
        return f"{message} (in {key[1]})" if message and key else message
    return None
