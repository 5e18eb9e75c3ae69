"""Requests served one after another, each in a thread of its own that outlives who asked for it, so that the line always moves on."""

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
    """One request: what is looked at while it runs, and what it came to; `said` is why it came to nothing."""

    watch: SamplerMonitor = field(default_factory=SamplerMonitor)
    done: Event = field(default_factory=Event)
    result: Any = None
    error: str | None = None


class RequestQueue:
    """First come, first served. most: that may wait."""

    def __init__(self, most: int = 8):
        self.most = most
        self._jobs: list[Job] = []
        self._moved = Condition()

    def start(self, work: Callable[[Job], Any]) -> Job:
        """The job of work(job), whose turn comes when those before it are done. Raises UserError for a line that is too long."""
        job = Job()
        with self._moved:
            if len(self._jobs) > self.most:
                raise UserError(f"{len(self._jobs)} requests are before this one: try again when some are done")
            self._jobs.append(job)
        Thread(target=self._run, args=(job, work), daemon=True).start()
        return job

    def position(self, job: Job) -> int:
        """How many are served before a job."""
        with self._moved:
            return self._jobs.index(job) if job in self._jobs else 0

    def stop(self, job: Job) -> None:
        """End a job at its next step, or where it waits."""
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
                job.error = f"{type(error).__name__} within the program, which goes on; its terminal says more"
        finally:
            with self._moved:
                self._jobs.remove(job)
                self._moved.notify_all()
            job.done.set()
