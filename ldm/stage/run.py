"""A run in progress: its folder, and whatever is written there and to the logger."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch import Tensor

from ldm import durable, picture, runs
from ldm.build import plain
from ldm.command import choices
from ldm.report import Logger, Silent
from ldm.training.fit import world


@dataclass
class Run:
    """folder: all that the run writes.  resume: the newest valid checkpoint, or None.  chief: whether this process writes."""

    folder: Path
    config: dict[str, Any]
    resume: durable.Step | None
    chief: bool
    journal: runs.Journal | None
    logger: Logger
    since: float

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

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, the mark of a finished run."""
        whole = {**metrics, "seconds": round(time.monotonic() - self.since, 1)}
        if self.chief:
            runs.finish(self.folder, whole)
            self.logger.table("scores", [{name: value for name, value in whole.items() if isinstance(value, int | float)}])
            self.logger.finish(whole)
        return whole


@contextmanager
def opened(cfg: Any, folder: Path) -> Iterator[Run]:
    """The run of this config in `folder`, taken up where its newest valid checkpoint left it. Raises UserError if another holds it."""
    config, chief = plain(cfg), world()[0] == 0
    since = time.monotonic()
    with ExitStack() as stack:
        if chief:
            stack.enter_context(runs.lock(folder))
            runs.save_config(config, folder / "config.yaml")
            durable.write_json(folder / "choices.json", choices())
            durable.write_json(folder / "provenance.json", runs.provenance(Path(__file__).parent))
            print(f"writing to {folder}", flush=True)
        step, skipped = durable.latest_valid(folder / "checkpoints")
        for path, reason in skipped if chief else []:
            print(f"skipping checkpoint {path}: {reason}", file=sys.stderr)
        resume = durable.load_step(step) if step else None
        if resume and chief:
            print(f"resuming from step {resume.step} ({step})", flush=True)
        journal = runs.Journal(folder / "metrics.jsonl", resume.step if resume else 0) if chief else None
        logger: Logger = instantiate(cfg.logger) if chief else Silent()
        logger.start(folder, config, choices())
        yield Run(folder, config, resume, chief, journal, logger, since)
        if journal is not None:
            journal.close()
