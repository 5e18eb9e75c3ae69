"""The status of a job before it runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class JobStatus:
    """Status of a job before it runs.

    metrics: final metrics of a finished run, else None.  result: the metric of these that a sweeper optimizes.
    steps_done: step of its newest checkpoint.  seconds: duration of a similar finished run; None if there is none.
    missing_dependencies: folder -> function that trains what belongs there (shared with other jobs); raises UserError.
    """

    metrics: Mapping[str, Any] | None = None
    result: float | None = None
    steps_done: int = 0
    seconds: float | None = None
    missing_dependencies: Mapping[Path, Callable[[], object]] = field(default_factory=dict)
