"""Serve requests one by one, each in its own thread, which outlives the page that sent it, so the queue moves on."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

from ldm.cli.errors import user_error_message
from ldm.errors import UserError
from ldm.sampling.monitor import SamplerMonitor, SamplingCancelled


@dataclass(eq=False)
class Job:
    """One request: its progress while it runs, its result, and the error message if it failed."""

    watch: SamplerMonitor = field(default_factory=SamplerMonitor)
    done: Event = field(default_factory=Event)
    result: Any = None
    error: str | None = None


class RequestQueue:
    """First come, first served; most: maximum number of waiting requests."""

    def __init__(self, most: int = 8):
        self.most = most
        self._jobs: list[Job] = []
        self._moved = Condition()

    def start(self, work: Callable[[Job], Any]) -> Job:
        """Queue work(job) and return the job.  Raises UserError if the queue is full."""
        job = Job()
        with self._moved:
            if len(self._jobs) > self.most:
                raise UserError(f"{len(self._jobs)} requests are before this one: try again when some are done")
            self._jobs.append(job)
        Thread(target=self._run, args=(job, work), daemon=True).start()
        return job

    def position(self, job: Job) -> int:
        """Return the number of jobs served before this one."""
        with self._moved:
            return self._jobs.index(job) if job in self._jobs else 0

    def stop(self, job: Job) -> None:
        """Cancel a job at its next step, or while it waits."""
        with self._moved:
            job.watch.stop.set()
            self._moved.notify_all()

    def _run(self, job: Job, work: Callable[[Job], Any]) -> None:
        try:
            with self._moved:
                self._moved.wait_for(lambda: self._jobs[0] is job or job.watch.stop.is_set())
            if job.watch.stop.is_set():
                raise SamplingCancelled
            job.result = work(job)
        except SamplingCancelled:
            job.error = "stopped"
        except Exception as error:
            job.error = user_error_message(error)
            if job.error is None:
                traceback.print_exc()
                job.error = f"{type(error).__name__} in the program, which keeps running; see its terminal"
        finally:
            with self._moved:
                self._jobs.remove(job)
                self._moved.notify_all()
            job.done.set()
