"""What the page does, whatever it looks like: each answer is a sequence of Views, the last of which stays."""

import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm.app import forms, keep, look
from ldm.app.forms import Asked
from ldm.app.limits import Limits
from ldm.app.line import Job, Line
from ldm.app.session import Session, Sessions
from ldm.app.watch import Seen
from ldm.command import mistake
from ldm.errors import UserError

LOOKS = 0.3  # seconds between two looks at what is being drawn
SHOWN = 16  # images of a preview

Form = Callable[..., Asked]  # (session, limits, fields)


@dataclass(frozen=True)
class View:
    """stage: HTML.  drawn: the files of each run that was asked, None while they are being made.  names: of the runs.

    archive: all the files, zipped.
    """

    stage: str
    drawn: Sequence[Sequence[Path]] | None = None
    names: Sequence[str] = ()
    archive: Path | None = None


@dataclass(frozen=True)
class Settings:
    """What every tab asks for; label: a class by name, None for all in turn."""

    prompt: str | None = ""
    negative: str | None = ""
    label: str | None = None
    sampler: str = "ddim"
    steps: Any = 20
    scale: Any = 4.0
    seed: Any = 0
    num: Any = 4


@dataclass
class Desk:
    """The one place where requests come in. who: a name for each person's page; a new request of theirs ends the one before."""

    sessions: Sessions
    limits: Limits = field(default_factory=Limits)
    looks: float = LOOKS

    def __post_init__(self) -> None:
        self.line = Line(self.limits.waiting)
        self.jobs: dict[str, Job] = {}
        self.scratch = TemporaryDirectory(prefix="ldm-app-")

    def draw(self, who: str, runs: Sequence[str], form: Form, fields: Sequence[Any], settings: Settings) -> Iterator[View]:
        """Images of each run, from the same seeds."""

        def check() -> list[tuple[Session, Any]]:
            return [(session, self.request(session, form, fields, settings)) for session in (self.sessions[run] for run in runs)]

        def work(asked: list[tuple[Session, Any]], job: Job) -> list[list[Path]]:
            return [session.draw(request, job.watch) for session, request in asked]

        for view in self._served(who, check, work):
            if view.drawn is None:
                yield view
                continue
            names = [Path(run).name for run in runs]
            if len(set(names)) < len(names):
                names = [f"{name} {number}" for number, name in enumerate(names, 1)]
            path = Path(self.scratch.name) / f"images-{time.time_ns()}.zip"
            yield View(view.stage, view.drawn, names, keep.zipped(dict(zip(names, view.drawn, strict=True)), path))

    def again(self, who: str, run: str, file: Path) -> Iterator[View]:
        """An image of a run made once more: the drawn are what it was and what it is."""
        said = ""

        def work(session: Session, job: Job) -> list[list[Path]]:
            nonlocal said
            new, said = session.again(file, job.watch)
            return [[file, new]]

        for view in self._served(who, lambda: self.sessions[run], work):
            yield view if view.drawn is None else View(look.note(f"Made again: {said}."), view.drawn)

    def request(self, session: Session, form: Form, fields: Sequence[Any], settings: Settings) -> Any:
        """The request of sample.py for a form of the page. Raises UserError before anything is computed."""
        own = form(session, self.limits, *fields)
        values = {
            **forms.told(session, settings.prompt, settings.negative, settings.label),
            **{name: getattr(settings, name) for name in ("steps", "seed", "num")},
            "guidance.scale": settings.scale,
            **own.values,
        }
        self.limits.check(values, own.size)
        if not isinstance(settings.scale, int | float) or not -100 <= settings.scale <= 100:
            raise UserError(f"guidance {settings.scale}: expected a number from -100 to 100")
        whole = {name: int(values[name]) for name in ("steps", "seed", "num")}
        return session.request(
            {"task": own.task, "sampler": settings.sampler}, {**values, **whole, "guidance.scale": float(settings.scale)}
        )

    def stop(self, who: str) -> None:
        """End what someone asked for last, if it has not ended."""
        if who in self.jobs:
            self.line.stop(self.jobs[who])

    def leave(self, who: str) -> None:
        """Someone's page was closed."""
        self.stop(who)
        self.jobs.pop(who, None)

    def made(self, run: str) -> list[Path]:
        """What was drawn from a run, the newest first."""
        return keep.made(self.sessions[run].home)

    def _served(self, who: str, check: Callable[[], Any], work: Callable[[Any, Job], Any]) -> Iterator[View]:
        self.stop(who)
        yield View(look.note("Looking at the request …"))
        try:
            asked = check()
            job = self.jobs[who] = self.line.start(lambda job: work(asked, job))
        except Exception as error:
            said = mistake(error)
            if said is None:
                raise
            yield View(look.fault(said))
            return
        began, last = time.monotonic(), None
        while not job.done.wait(self.looks):
            before = self.line.before(job)
            if before:
                yield View(look.note(f"Waiting: {before} request{'s' if before > 1 else ''} before this one."))
            elif job.watch.seen is not None and job.watch.seen is not last:
                last = job.watch.seen
                yield View(look.progress(last.done, last.total, last.seconds_left, preview(last)))
        if job.made is None:
            yield View(look.note("Stopped; nothing of it was kept.") if job.watch.stop.is_set() else look.fault(job.said or ""))
            return
        count = sum(map(len, job.made))
        yield View(
            look.note(f"{count} image{'s' if count > 1 else ''} in {time.monotonic() - began:.1f} s, in {job.made[0][0].parent}"), job.made
        )


def preview(seen: Seen) -> str:
    """The images that a sampler expects, as the address of a PNG."""
    import torch

    from ldm import picture
    from ldm.metrics.features import to_uint8

    with torch.inference_mode():
        images = to_uint8(seen.decode(seen.x0[:SHOWN])).cpu()
    sheet = picture.grid(images, max(1, round(len(images) ** 0.5)), zoom=max(1, 96 // images.shape[-1]))
    return f"data:image/png;base64,{b64encode(picture.png(sheet)).decode()}"
