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

from ldm.checkpoint.step import Checkpoint
from ldm.config import serialize
from ldm.config.build import to_container
from ldm.config.compose import current_choices
from ldm.devices import rank_and_world_size
from ldm.ema import PowerEMA
from ldm.errors import UserError
from ldm.io import atomic, images
from ldm.recipes import resume
from ldm.runs import identity, provenance
from ldm.runs.folder import lock_run
from ldm.runs.metrics_log import MetricsLog, read_metrics_log, write_final_metrics
from ldm.training.best import BestLater, restore_best, signed
from ldm.training.callbacks import (
    CheckpointCallback,
    EMACallback,
    EMASnapshots,
    LearningRate,
    MetricsRecorder,
    Progress,
    RetentionPolicy,
    SampleGridCallback,
)
from ldm.training.gradients import GradientGuard
from ldm.training.loggers import Logger, NoLogger
from ldm.training.parallel import RankConsistencyCheck
from ldm.training.preemption import GracefulStop
from ldm.training.startup_report import StartupReport


@dataclass
class TrainingRun:
    """folder: all that the run writes.  resume: the checkpoint it goes on from, or None.  chief: whether this process writes."""

    folder: Path
    config: dict[str, Any]
    resume: Checkpoint | None
    is_main_process: bool
    metrics_log: MetricsLog | None
    logger: Logger
    start_time: float
    unread: dict[str, float] = field(default_factory=dict)  # numbers since `worth` was last called
    written: set[str] = field(default_factory=set)  # the names of all numbers

    @property
    def start(self) -> int:
        return self.resume.step if self.resume else 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def config_text(self) -> str:
        return (self.folder / "config.yaml").read_text() if self.is_main_process else ""

    def print(self, text: str) -> None:
        if self.is_main_process:
            print(text, flush=True)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.unread |= values
        self.written |= values.keys()
        if self.metrics_log is not None:
            self.metrics_log.write(step, values)
            self.logger.log_metrics(step, values)

    def save_image(self, step: int, name: str, image: Tensor) -> Path:
        """Keep a picture (C, H, W) uint8 as <name>.png; returns where."""
        path = self.folder / f"{name}.png"
        if self.is_main_process:
            images.save_png(path, image)
            self.logger.log_image(step, name, path)
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
        gradients = GradientGuard(self.folder, self.config.get("max_skipped_steps", 10))
        metric = self.config.get("keep_best") or ""
        best: dict[str, Any] = (
            {"value": self.best_metric, "metric": metric, "written": lambda: self.written} if metric else {}
        )
        keep = RetentionPolicy(self.config.get("keep_last", 2), self.config.get("keep_every"), **best)
        saving = CheckpointCallback(
            self.checkpoints, ema, save_every, steps, self.config_text(), self.resume, metadata, keep, averages
        )
        debug = [instantiate(self.config["debug"])(self.folder)] if self.config.get("debug") else []
        return [
            RankConsistencyCheck({"config": identity.hash_config(self.config), "first step": self.start}),
            *debug,
            StartupReport(name, steps, lr_schedule, self.config["trainer"].get("accumulate_grad_batches", 1)),
            LearningRate(lr_schedule, steps),
            gradients,
            *([EMACallback(ema)] if ema else []),
            *map(EMACallback, averages.values()),
            MetricsRecorder(self.log_metrics, log_every, steps, gradients),
            Progress(name, self.start, steps),
            *watch,
            *(
                [EMASnapshots(self.folder / "averages", averages, snapshot_every, steps, metadata)]
                if snapshot_every is not None
                else []
            ),
            saving,
            *([SampleGridCallback(draw, grid_every, ema)] if draw else []),
            *([BestLater(saving)] if draw and metric else []),
            GracefulStop(saving.save),
        ]

    def best_metric(self) -> float | None:
        """The number that keep_best names if it was written since the last call, its sign turned for -name."""
        metric = self.config.get("keep_best") or ""
        value = self.unread.pop(metric.removeprefix("-"), None)
        return None if value is None else signed(metric, value)

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, the mark of a finished run."""
        whole = {**metrics, "seconds": round(time.monotonic() - self.start_time, 1)}
        if self.is_main_process:
            write_final_metrics(self.folder, whole)
            self.logger.log_table(
                "scores", [{name: value for name, value in whole.items() if isinstance(value, int | float)}]
            )
            self.logger.finish(whole)
        return whole


@contextmanager
def open_run(cfg: Any, folder: Path, parts: Collection[str] | None = None) -> Iterator[TrainingRun]:
    """The run of this config in `folder`, taken up as its `resume` says; parts: the top keys that decide its steps, None for all.

    Raises UserError if another process holds the folder, or as resume.checkpoint does.
    """
    config, chief = to_container(cfg), rank_and_world_size()[0] == 0
    since, new = time.monotonic(), not folder.exists()
    with ExitStack() as stack:
        if chief:
            stack.enter_context(lock_run(folder))
            stack.enter_context(provenance.tee_output(folder / "log.txt"))
        try:
            found = resume.find_resume_checkpoint(config, folder, chief, parts)
        except UserError:
            if chief and new:  # with nothing in it but our own lock and log
                shutil.rmtree(folder)
            raise
        if chief:
            serialize.save_config(config, folder / "config.yaml")
            atomic.write_json(folder / "choices.json", current_choices())
            provenance.write_provenance(folder, Path(__file__).parent)
            print(f"writing to {folder}", flush=True)
            if config.get("keep_best"):
                rows, until = read_metrics_log(folder / "metrics.jsonl"), found.step if found else 0
                restore_best(folder / "checkpoints", config["keep_best"], rows, until)
        journal = MetricsLog(folder / "metrics.jsonl", found.step if found else 0) if chief else None
        if journal is not None:
            stack.callback(journal.close)
        logger: Logger = instantiate(cfg.logger) if chief else NoLogger()
        logger.start(folder, config, current_choices())
        stack.callback(logger.close)
        yield TrainingRun(folder, config, found, chief, journal, logger, since)
