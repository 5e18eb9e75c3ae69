"""The logic of the web page, independent of its layout: each action yields Views, the last of which stays."""

import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm.app import requests, storage, style
from ldm.app.limits import Limits
from ldm.app.queue import Job, RequestQueue
from ldm.app.requests import TaskRequest
from ldm.app.session import Session, SessionCache
from ldm.cli.errors import user_error_message
from ldm.errors import UserError
from ldm.sampling.monitor import SamplerState

POLL_SECONDS = 0.3  # between two updates of the progress

Form = Callable[..., TaskRequest]  # (session, limits, fields)


@dataclass(frozen=True)
class View:
    """What the page shows.

    stage: HTML.  images: the pictures of each requested run's samples, None while they are being generated; a sample's
    other files are beside its picture.  names: of the runs.  archive: a zip of all files.
    """

    stage: str
    images: Sequence[Sequence[Path]] | None = None
    names: Sequence[str] = ()
    archive: Path | None = None


@dataclass(frozen=True)
class Settings:
    """Settings shared by all tabs; label: a class name, None for all classes in turn."""

    prompt: str | None = ""
    negative: str | None = ""
    label: str | None = None
    sampler: str = "ddim"
    steps: Any = 20
    scale: Any = 4.0
    seed: Any = 0
    num: Any = 4


@dataclass
class AppController:
    """Entry point of all requests.

    who: identifies the page of one user; a new request of the same user cancels the previous one.
    """

    sessions: SessionCache
    limits: Limits = field(default_factory=Limits)
    looks: float = POLL_SECONDS

    def __post_init__(self) -> None:
        self.line = RequestQueue(self.limits.waiting)
        self.jobs: dict[str, Job] = {}
        self.scratch = TemporaryDirectory(prefix="ldm-app-")

    def draw(
        self, who: str, runs: Sequence[str], form: Form, fields: Sequence[Any], settings: Settings
    ) -> Iterator[View]:
        """Generate images from each run with the same seeds."""

        def check() -> list[tuple[Session, Any]]:
            return [
                (session, self.request(session, form, fields, settings))
                for session in (self.sessions[run] for run in runs)
            ]

        def work(jobs: list[tuple[Session, Any]], job: Job) -> list[list[Path]]:
            return [session.draw(request, job.watch) for session, request in jobs]

        for view in self._served(who, check, work):
            if view.images is None:
                yield view
                continue
            names = [Path(run).name for run in runs]
            if len(set(names)) < len(names):
                names = [f"{name} {number}" for number, name in enumerate(names, 1)]
            path = Path(self.scratch.name) / f"images-{time.time_ns()}.zip"
            yield View(
                view.stage, view.images, names, storage.zip_files(dict(zip(names, view.images, strict=True)), path)
            )

    def repeat(self, who: str, run: str, file: Path) -> Iterator[View]:
        """Generate an image of a run once more; the result is the old and the new image."""
        comparison = ""

        def work(session: Session, job: Job) -> list[list[Path]]:
            nonlocal comparison
            new, comparison = session.repeat(file, job.watch)
            return [[file, new]]

        for view in self._served(who, lambda: self.sessions[run], work):
            yield view if view.images is None else View(style.note(f"Made again: {comparison}."), view.images)

    def request(self, session: Session, form: Form, fields: Sequence[Any], settings: Settings) -> Any:
        """Build the request of sample.py for a form of the page.  Raises UserError before anything is computed."""
        own = form(session, self.limits, *fields)
        values = {
            **requests.conditions(session, settings.prompt, settings.negative, settings.label),
            **{name: getattr(settings, name) for name in ("steps", "seed", "num")},
            "guidance.scale": settings.scale,
            **own.values,
        }
        self.limits.check(values, own.size)
        if not isinstance(settings.scale, int | float) or not -100 <= settings.scale <= 100:
            raise UserError(f"guidance {settings.scale}: expected a number from -100 to 100")
        integers = {name: int(values[name]) for name in ("steps", "seed", "num")}
        return session.request(
            {"task": own.task, "sampler": settings.sampler},
            {**values, **integers, "guidance.scale": float(settings.scale)},
        )

    def stop(self, who: str) -> None:
        """Cancel the last request of a user, if it has not finished."""
        if who in self.jobs:
            self.line.stop(self.jobs[who])

    def disconnect(self, who: str) -> None:
        """Clean up when a user closes the page."""
        self.stop(who)
        self.jobs.pop(who, None)

    def list_images(self, run: str) -> list[Path]:
        """List the images generated from a run, newest first."""
        return storage.list_images(self.sessions[run].home)

    def _served(self, who: str, check: Callable[[], Any], work: Callable[[Any, Job], Any]) -> Iterator[View]:
        """Check a request, run it in the queue and yield Views of its progress and result."""
        self.stop(who)
        yield View(style.note("Looking at the request …"))
        try:
            request = check()
            job = self.jobs[who] = self.line.start(lambda job: work(request, job))
        except Exception as error:
            message = user_error_message(error)
            if message is None:
                raise
            yield View(style.error(message))
            return
        start, last = time.monotonic(), None
        while not job.done.wait(self.looks):
            before = self.line.position(job)
            if before:
                yield View(style.note(f"Waiting: {before} request{'s' if before > 1 else ''} before this one."))
            elif job.watch.state is not None and job.watch.state is not last:
                last = job.watch.state
                yield View(style.progress(last.done, last.total, last.seconds_left, preview(last)))
        if job.result is None:
            yield View(
                style.note("Stopped; no image was saved.") if job.watch.stop.is_set() else style.error(job.error or "")
            )
            return
        count, seconds = sum(map(len, job.result)), time.monotonic() - start
        yield View(
            style.note(f"{count} image{'s' if count > 1 else ''} in {seconds:.1f} s, in {job.result[0][0].parent}"),
            job.result,
        )


def preview(state: SamplerState) -> str:
    """Return the picture of the sampler's current prediction as a data URL of a PNG."""
    from ldm.io.images import encode_png, to_uint8

    return f"data:image/png;base64,{b64encode(encode_png(to_uint8(state.show(state.x0)))).decode()}"
