"""Status of a job before it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JobStatus:
    """A job before it runs.

    metrics: the final ones of a run that is done, else None.  result: of these, the one that a sweeper is told.
    begun: steps that are kept.  seconds: what a run like it took, None where there is none.
    needs: what it shares with other jobs and is not there yet, by its folder; the call trains it, and raises UserError.
    """

    metrics: Mapping[str, Any] | None = None
    result: float | None = None
    steps_done: int = 0
    seconds: float | None = None
    missing_dependencies: Mapping[Path, Callable[[], object]] = field(default_factory=dict)
