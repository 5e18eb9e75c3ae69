"""A run in progress: its folder, what is written to it and to the logger, and the callbacks of its training."""

import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from ldm.ema import WeightAverage
from ldm.errors import UserError
from ldm.io import atomic, images
from ldm.media.medium import Medium
from ldm.recipes import resume
from ldm.recipes.callbacks import build_callbacks
from ldm.runs import identity, provenance
from ldm.runs.folder import PLAYERS, lock_run
from ldm.runs.metrics_log import MetricsLog, read_metrics_log, write_final_metrics
from ldm.training.best import restore_best, signed
from ldm.training.callbacks import EMACallback, LearningRate, MetricsRecorder, Progress, SampleGridCallback
from ldm.training.checkpoints import (
    BestLater,
    CheckpointCallback,
    CheckpointRestorer,
    EMASnapshots,
    RetentionPolicy,
)
from ldm.training.fit import check_device
from ldm.training.gradients import GradientGuard
from ldm.training.health import HealthCondition, HealthMonitor
from ldm.training.loggers import Logger, NoLogger
from ldm.training.parallel import RankConsistencyCheck
from ldm.training.preemption import GracefulStop
from ldm.training.startup_report import StartupReport
from ldm.training.user_callbacks import UserCallbacks

PLAYED = 4  # samples of a grid whose files are written too, where the grid does not show all of them


@dataclass
class TrainingRun:
    """A run in progress.

    folder: where the run writes.  resume: the checkpoint from which it goes on, or None.
    is_main_process: whether this process writes.  metrics_log: of the main process, None in others.
    start_time: of time.monotonic(), in seconds.
    """

    folder: Path
    config: dict[str, Any]
    resume: Checkpoint | None
    is_main_process: bool
    metrics_log: MetricsLog | None
    logger: Logger
    start_time: float
    unread: dict[str, float] = field(default_factory=dict)  # numbers since the last call of best_metric
    written: set[str] = field(default_factory=set)  # names of all numbers so far
    health: HealthMonitor | None = None

    @property
    def start(self) -> int:
        """Return the number of steps done before this process started."""
        return self.resume.step if self.resume else 0

    @property
    def checkpoints(self) -> Path:
        """Return the folder of the step folders."""
        return self.folder / "checkpoints"

    def config_text(self) -> str:
        """Return the text of config.yaml; empty in processes that do not write."""
        return (self.folder / "config.yaml").read_text() if self.is_main_process else ""

    def print(self, text: str) -> None:
        """Print a text in the main process."""
        if self.is_main_process:
            print(text, flush=True)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of the state after `step` steps to metrics.jsonl and the logger.

        What the health monitor makes of them is printed, and written as a number health/NAME.
        """
        self.unread |= values
        self.written |= values.keys()
        if self.metrics_log is not None:
            warnings = self.health.observe(step, values) if self.health else []
            values = {**values, **{f"health/{warning.condition.name}": warning.value for warning in warnings}}
            self.metrics_log.write(step, values)
            self.logger.log_metrics(step, values)
            for warning in warnings:
                self.print(f"\nwarning: {warning}")

    def watch_health(self, conditions: Sequence[HealthCondition], window: int) -> None:
        """Warn once about each condition, over a number of steps; those of before a resume are not repeated."""
        if self.metrics_log is not None:
            self.health = HealthMonitor(conditions, window, read_metrics_log(self.folder / "metrics.jsonl"))

    def save_image(self, step: int, name: str, image: Tensor) -> Path:
        """Write an image (C, H, W) uint8 to <name>.png in the folder and to the logger; return its path."""
        path = self.folder / f"{name}.png"
        if self.is_main_process:
            images.save_png(path, image)
            self.logger.log_file(step, name, path)
        return path

    def save_samples(
        self,
        step: int,
        name: str,
        medium: Medium,
        samples: Sequence[Tensor],
        columns: int,
        rate: float | None = None,
        played: Sequence[int] | None = None,
    ) -> None:
        """Write samples (C, ...) in [-1, 1] as the medium's sheet <name>.png in the folder and to the logger.

        Of a medium whose sheet does not show all of a sample, the files of some samples are written too, to a folder of
        the picture's name in players/, and logged as players/0/wav, ...
        rate: of the data set.  played: the samples of which files are written; default: PLAYED, spread over all.
        """
        self.save_image(step, name, images.to_uint8(medium.sheet(samples, columns)))
        if medium.is_picture or not self.is_main_process:
            return
        count = min(PLAYED, len(samples))
        spread = [round(k * (len(samples) - 1) / max(1, count - 1)) for k in range(count)]
        metadata = {} if rate is None else {"rate": str(rate)}
        for k, i in enumerate(spread if played is None else played):
            for path in medium.write(self.folder / PLAYERS / Path(name).name / f"{i:03d}", samples[i], metadata):
                self.logger.log_file(step, f"{PLAYERS}/{k}/{path.suffix[1:]}", path)

    def callbacks(
        self,
        name: str,
        *,
        steps: int,
        lr_schedule: Callable[[int, int], float],
        log_every: int,
        save_every: int,
        ema: WeightAverage | None = None,
        metadata: dict[str, str] | None = None,
        draw: Callable[[int], None] | None = None,
        grid_every: int = 0,
        watch: Collection[Any] = (),
        averages: Mapping[str, WeightAverage] = MappingProxyType({}),
        snapshot_every: int | None = None,
    ) -> list[Any]:
        """Return the callbacks of a training that is displayed as `name`, in the order in which Lightning calls them.

        Checks and the restored checkpoint come first, then averages and records, then the callbacks of the config, then
        checkpoints, images and the stop on a signal.
        lr_schedule: (step, total steps) -> factor on each optimizer's rate.  metadata: of the checkpoint's weights.
        draw: writes an image of the state after a step, every grid_every steps.  watch: callbacks before the
        checkpoint's.
        averages: weight averages besides ema, by name, stored every snapshot_every steps.
        """
        gradients = GradientGuard(self.folder, self.config.get("max_skipped_steps", 10))
        metric = self.config.get("keep_best") or ""
        best: dict[str, Any] = (
            {"value": self.best_metric, "metric": metric, "written": lambda: self.written} if metric else {}
        )
        keep = RetentionPolicy(self.config.get("keep_last", 2), self.config.get("keep_every"), **best)
        user = UserCallbacks(build_callbacks(self.config), self.log_metrics, self.folder)
        saving = CheckpointCallback(
            self.checkpoints, ema, save_every, steps, self.config_text(), metadata, keep, averages, user
        )
        debug = [instantiate(self.config["debug"])(self.folder)] if self.config.get("debug") else []
        return [
            RankConsistencyCheck({"config": identity.hash_config(self.config), "first step": self.start}),
            *([CheckpointRestorer(self.resume, ema, averages, user)] if self.resume else []),
            *debug,
            StartupReport(name, steps, lr_schedule, self.config["trainer"].get("accumulate_grad_batches", 1)),
            LearningRate(lr_schedule, steps),
            gradients,
            *([EMACallback(ema, gradients)] if ema else []),
            *(EMACallback(average, gradients) for average in averages.values()),
            MetricsRecorder(self.log_metrics, log_every, steps, gradients),
            Progress(name, self.start, steps),
            *watch,
            *(
                [EMASnapshots(self.folder / "averages", averages, snapshot_every, steps, metadata)]
                if snapshot_every is not None
                else []
            ),
            user,
            saving,
            *([SampleGridCallback(draw, grid_every, ema)] if draw else []),
            *([BestLater(saving)] if draw and metric else []),
            GracefulStop(saving.save),
        ]

    def best_metric(self) -> float | None:
        """Return the number that keep_best names, negated for -name, if written since the last call, else None."""
        metric = self.config.get("keep_best") or ""
        value = self.unread.pop(metric.removeprefix("-"), None)
        return None if value is None else signed(metric, value)

    def finish(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write metrics.json, which marks the run as finished; return the metrics with its seconds."""
        metrics = {**metrics, "seconds": round(time.monotonic() - self.start_time, 1)}
        if self.is_main_process:
            write_final_metrics(self.folder, metrics)
            scores = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            self.logger.log_table("scores", [scores])
            self.logger.finish(metrics)
        return metrics


@contextmanager
def open_run(cfg: Any, folder: Path, parts: Collection[str] | None = None) -> Iterator[TrainingRun]:
    """Open the run of a config in `folder`, resumed as cfg.resume says.

    parts: top-level keys of the config on which the training steps depend; None for all.
    Raises ConfigError as check_device does, UserError if another process has locked the folder, or as
    find_resume_checkpoint does.
    """
    config, chief = to_container(cfg), rank_and_world_size()[0] == 0
    check_device(*(config["trainer"].get(name, "auto") for name in ("accelerator", "strategy", "precision")))
    start_time, is_new = time.monotonic(), not folder.exists()
    with ExitStack() as stack:
        if chief:
            stack.enter_context(lock_run(folder))
            stack.enter_context(provenance.tee_output(folder / "log.txt"))
        try:
            checkpoint = resume.find_resume_checkpoint(config, folder, chief, parts)
        except UserError:
            if chief and is_new:  # the folder has nothing but this process's lock and log
                shutil.rmtree(folder)
            raise
        if chief:
            serialize.save_config(config, folder / "config.yaml")
            atomic.write_json(folder / "choices.json", current_choices())
            provenance.write_provenance(folder, Path(__file__).parent)
            print(f"writing to {folder}", flush=True)
            if config.get("keep_best"):
                rows, until = read_metrics_log(folder / "metrics.jsonl"), checkpoint.step if checkpoint else 0
                restore_best(folder / "checkpoints", config["keep_best"], rows, until)
        journal = MetricsLog(folder / "metrics.jsonl", checkpoint.step if checkpoint else 0) if chief else None
        if journal is not None:
            stack.callback(journal.close)
        logger: Logger = instantiate(cfg.logger) if chief else NoLogger()
        logger.start(folder, config, current_choices())
        stack.callback(logger.close)
        yield TrainingRun(folder, config, checkpoint, chief, journal, logger, start_time)
