"""A run in progress: its folder, and whatever is written there and to the logger."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from ldm import durable, picture, runs
from ldm.build import plain
from ldm.command import choices
from ldm.ema import PowerEMA
from ldm.errors import UserError
from ldm.logger import Logger, Silent
from ldm.stage import resume
from ldm.training.announce import Announce
from ldm.training.best import BestLater, restore_best, signed
from ldm.training.callbacks import Average, Checkpoints, Keep, LearningRate, Pictures, Progress, Record, Snapshots
from ldm.training.fit import world
from ldm.training.gradients import Gradients
from ldm.training.parallel import Agreement
from ldm.training.stop import Stop


@dataclass
class Run:
    """folder: all that the run writes.  resume: the checkpoint it goes on from, or None.  chief: whether this process writes."""

    folder: Path
    config: dict[str, Any]
    resume: durable.Step | None
    chief: bool
    journal: runs.Journal | None
    logger: Logger
    since: float
    unread: dict[str, float] = field(default_factory=dict)  # numbers since `worth` was last called
    written: set[str] = field(default_factory=set)  # the names of all numbers

    @property
    def start(self) -> int:
        return self.resume.step if self.resume else 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def config_text(self) -> str:
        return (self.folder / "config.yaml").read_text() if self.chief else ""

    def say(self, text: str) -> None:
        if self.chief:
            print(text, flush=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.unread |= values
        self.written |= values.keys()
        if self.journal is not None:
            self.journal.write(step, values)
            self.logger.metrics(step, values)

    def picture(self, step: int, name: str, image: Tensor) -> Path:
        """Keep a picture (C, H, W) uint8 as <name>.png; returns where."""
        path = self.folder / f"{name}.png"
        if self.chief:
            picture.save(path, image)
            self.logger.picture(step, name, path)
        return path

    def callbacks(
        self,
        name: str,
        *,
        steps: int,
        lr_schedule: Callable[[int, int], float],
        log_every: int,
        save_every: int,
        ema: PowerEMA | None = None,
        metadata: dict[str, str] | None = None,
        draw: Callable[[int], None] | None = None,
        grid_every: int = 0,
        watch: Collection[Any] = (),
        averages: Mapping[str, PowerEMA] = MappingProxyType({}),
        snapshot_every: int | None = None,
    ) -> list[Any]:
        """What goes on around each step of a training shown as `name`, in this order: what looks, what writes, what ends it.

        watch: more of what looks, before a checkpoint is kept.  averages: others than ema, by name, kept every snapshot_every steps.
        """
        gradients = Gradients(self.folder, self.config.get("skips", 10))
        metric = self.config.get("keep_best") or ""
        best: dict[str, Any] = {"value": self.worth, "metric": metric, "written": lambda: self.written} if metric else {}
        keep = Keep(self.config.get("keep_last", 2), self.config.get("keep_every"), **best)
        saving = Checkpoints(self.checkpoints, ema, save_every, steps, self.config_text(), self.resume, metadata, keep, averages)
        debug = [instantiate(self.config["debug"])(self.folder)] if self.config.get("debug") else []
        return [
            Agreement({"config": runs.fingerprint(self.config), "first step": self.start}),
            *debug,
            Announce(name, steps, lr_schedule, self.config["trainer"].get("accumulate", 1)),
            LearningRate(lr_schedule, steps),
            gradients,
            *([Average(ema)] if ema else []),
            *map(Average, averages.values()),
            Record(self.write, log_every, steps, gradients),
            Progress(name, self.start, steps),
            *watch,
            *([Snapshots(self.folder / "averages", averages, snapshot_every, steps, metadata)] if snapshot_every is not None else []),
            saving,
            *([Pictures(draw, grid_every, ema)] if draw else []),
            *([BestLater(saving)] if draw and metric else []),
            Stop(saving.save),
        ]

    def worth(self) -> float | None:
        """The number that keep_best names if it was written since the last call, its sign turned for -name."""
        metric = self.config.get("keep_best") or ""
        value = self.unread.pop(metric.removeprefix("-"), None)
        return None if value is None else signed(metric, value)

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, the mark of a finished run."""
        whole = {**metrics, "seconds": round(time.monotonic() - self.since, 1)}
        if self.chief:
            runs.finish(self.folder, whole)
            self.logger.table("scores", [{name: value for name, value in whole.items() if isinstance(value, int | float)}])
            self.logger.finish(whole)
        return whole


@contextmanager
def opened(cfg: Any, folder: Path, parts: Collection[str] | None = None) -> Iterator[Run]:
    """The run of this config in `folder`, taken up as its `resume` says; parts: the top keys that decide its steps, None for all.

    Raises UserError if another process holds the folder, or as resume.checkpoint does.
    """
    config, chief = plain(cfg), world()[0] == 0
    since, new = time.monotonic(), not folder.exists()
    with ExitStack() as stack:
        if chief:
            stack.enter_context(runs.lock(folder))
            stack.enter_context(runs.logged(folder / "log.txt"))
        try:
            found = resume.checkpoint(config, folder, chief, parts)
        except UserError:
            if chief and new:  # with nothing in it but our own lock and log
                shutil.rmtree(folder)
            raise
        if chief:
            runs.save_config(config, folder / "config.yaml")
            durable.write_json(folder / "choices.json", choices())
            runs.write_origin(folder, Path(__file__).parent)
            print(f"writing to {folder}", flush=True)
            if config.get("keep_best"):
                rows, until = runs.read_journal(folder / "metrics.jsonl"), found.step if found else 0
                restore_best(folder / "checkpoints", config["keep_best"], rows, until)
        journal = runs.Journal(folder / "metrics.jsonl", found.step if found else 0) if chief else None
        if journal is not None:
            stack.callback(journal.close)
        logger: Logger = instantiate(cfg.logger) if chief else Silent()
        logger.start(folder, config, choices())
        stack.callback(logger.close)
        yield Run(folder, config, found, chief, journal, logger, since)
