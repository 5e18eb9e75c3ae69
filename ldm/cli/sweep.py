"""Run the jobs of a sweep, each as its own process: a forecast before, a table of results after."""

import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from ldm.cli.errors import user_error_message
from ldm.config import serialize
from ldm.config.compose import current_choices, resolved_config
from ldm.config.sweeps import name_job
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.parse import parse_yaml
from ldm.io.progress import format_duration
from ldm.launch import gpus, process
from ldm.launch.exit_codes import STOP_EXIT_CODES
from ldm.runs.status import JobStatus


@dataclass(frozen=True)
class JobResult:
    """Outcome of a job: done, skipped (it was done before) or failed."""

    job: int
    overrides: str
    state: str
    result: float | None = None
    seconds: float | None = None
    reason: str = ""

    def text(self, width: int) -> str:
        result = "" if self.result is None else f"{self.result:.6g}"
        seconds = "" if self.seconds is None else f"{self.seconds:.1f} s"
        line = f"  {self.overrides:<{width}}  {self.state:<12}{result:>12}{seconds:>12}  {self.reason}".rstrip()
        return red(line) if self.state.startswith("failed") else line


def red(text: str) -> str:
    return f"\x1b[31m{text}\x1b[0m" if sys.stdout.isatty() else text


def format_forecast(jobs: Sequence[str], known: Sequence[JobStatus]) -> str:
    """Return the table of a sweep before it starts: its jobs, which are done, and the estimated time of the others."""
    width = max(map(len, jobs), default=0)
    lines = []
    for overrides, one in zip(jobs, known, strict=True):
        if one.metrics is not None:
            duration = one.metrics.get("seconds")
            state = "done"
            more = [f"{one.result:.6g}"] if one.result is not None else []
            more += [format_duration(duration)] if duration else []
        else:
            state = f"step {one.steps_done:,}" if one.steps_done else "to run"
            more = [f"about {format_duration(one.seconds)}" if one.seconds is not None else "no similar run to go by"]
        lines.append(f"  {overrides:<{width}}  {state:<14}{'  '.join(more)}")
    left = [one for one in known if one.metrics is None]
    for folder, _, numbers in shared_dependencies(known):
        lines.append(f"  {folder.parent.name} {folder.name} is missing: trained first, for {count_jobs(len(numbers))}")
    times = [one.seconds for one in left if one.seconds is not None]
    hours = sum(times) / 3600 + (len(left) - len(times)) * statistics.mean(times) / 3600 if times else 0
    total = f"about {hours:.2g} hours" if times else ""
    counted = f"{count_jobs(len(known))}, {len(known) - len(left)} done, {len(left)} to run"
    unknown = ", time unknown: no finished run is like them" if left else ""
    return "\n".join(
        [*lines, counted + (f", {total} one after another, judging by similar runs" if total else unknown)]
    )


def count_jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"


def shared_dependencies(known: Sequence[JobStatus]) -> list[tuple[Path, Callable[[], object], list[int]]]:
    """List the missing dependencies of jobs that are not done: (folder, function that trains it, job numbers)."""
    shared: dict[Path, tuple[Path, Callable[[], object], list[int]]] = {}
    for number, one in enumerate(known):
        for folder, train in one.missing_dependencies.items() if one.metrics is None else ():
            shared.setdefault(folder, (folder, train, []))[2].append(number)
    return list(shared.values())


def train_dependencies(names: Sequence[str], known: Sequence[JobStatus], train: bool = True) -> dict[int, JobResult]:
    """Train the first stages and evaluators that the sweep's jobs share, before any job starts.

    train: if False, only report; the first job that needs a dependency then trains it, and the others wait.
    Returns a result for each job that need not run, by its number: already finished, or failed with a dependency.
    """
    rows = {}
    for number, one in enumerate(known):
        if one.metrics is not None:
            rows[number] = JobResult(number, names[number], "skipped", one.result, reason="it was done before")
    for folder, call, numbers in shared_dependencies(known) if train else ():
        print(f"\nfirst, for {count_jobs(len(numbers))}: {folder.parent.name} {folder.name}", flush=True)
        try:
            call()
        except UserError as error:
            print(red(f"{folder.parent.name} {folder.name} failed: {error}"), file=sys.stderr)
            rows |= {
                number: JobResult(number, names[number], "failed", reason=f"{folder.parent.name} {folder.name} failed")
                for number in numbers
            }
    return rows


@dataclass
class SweepJob:
    """The task function that Hydra calls with each composed config.

    It runs the task in this process, or, for a job of a sweep or a job on several devices, in a process of its own.

    rows: folder where jobs write their results, whichever process calls this.  names: overrides of each job, if known.
    resolved_jobs: results of jobs that need not or cannot run, by number.
    adaptive: whether the sweeper chooses jobs by the results of others.  sweep: its name.
    gpus: GPUs to share among the jobs, one each unless a job asks for more.
    """

    task: Callable[..., Any]
    script: Path
    started: bool = False
    failure: BaseException | None = None
    rows: Path | None = None
    names: Sequence[str] = ()
    resolved_jobs: Mapping[int, JobResult] = field(default_factory=dict)
    adaptive: bool = False
    sweep: str = ""
    gpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.__name__, self.__module__ = self.script.stem, __name__

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        self.started = True
        hydra = HydraConfig.get()
        devices = _devices(cfg)
        if hydra.mode is not None and hydra.mode.name == "MULTIRUN":
            # as typed, interpolations unresolved
            overrides = name_job(cast(list[str], OmegaConf.to_container(hydra.overrides.task, resolve=False)))
            return self._run_sweep_job(cfg, self._number(hydra.job.num, overrides), overrides, devices)
        if devices > 1 and not process.is_launched_rank():
            self.failure = SystemExit(self._run_subprocess(cfg, devices)[0])
            return None
        return self._run(cfg)

    def _run(self, cfg: Any) -> Any:
        try:
            result = self.task(cfg)
            if os.environ.get("RANK", "0") == "0":
                _report_result(
                    {"result": result if isinstance(result, int | float) and math.isfinite(result) else None}
                )
            return result
        except Exception as error:
            message = user_error_message(error) or f"{type(error).__name__}: {error}"
            _report_result({"error": " ".join(message.split())})
            self.failure = error  # raised by finish(): raised here, Hydra would print it a second time
            return None

    def _run_subprocess(self, cfg: Any, devices: int) -> tuple[int, dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="ldm-job-") as folder:
            serialize.write_config(resolved_config(cfg), Path(folder), current_choices())
            report = Path(folder) / "result.json"
            env = {"LDM_RESULT": str(report)} | ({"LDM_SWEEP": self.sweep} if self.sweep else {})
            with gpus.acquire_gpus(self.gpus, devices) as pinned:
                code = process.run_in_subprocess(self.script, Path(folder), devices, env | pinned)
            return code, json.loads(report.read_text()) if report.is_file() else {}

    def _number(self, number: int, overrides: str) -> int:
        """Return a job's number in `names` by its overrides; Hydra's own number if `names` is empty.

        Raises RuntimeError for a job that is not in `names`.
        """
        if not self.names or (number < len(self.names) and self.names[number] == overrides):
            return number
        if overrides not in self.names:
            raise RuntimeError(f"the job {overrides!r} is not one of the {len(self.names)} jobs of the sweep")
        return self.names.index(overrides)

    def _run_sweep_job(self, cfg: Any, number: int, overrides: str, devices: int) -> Any:
        of = f" of {len(self.names)}" if self.names else ""
        if number in self.resolved_jobs:
            print(f"\njob {number + 1}{of}, {self.resolved_jobs[number].state}: {overrides}", flush=True)
            return self.resolved_jobs[number].result
        print(f"\njob {number + 1}{of}: {overrides}", flush=True)
        start = time.monotonic()
        if process.is_launched_rank():  # started by a cluster's launcher
            code, report = 0, {"result": self.task(cfg)}
        else:
            try:
                code, report = self._run_subprocess(cfg, devices)
            except Exception as error:  # it never started; without a row a search would leave it out of its table
                code, report = 1, {"error": user_error_message(error) or f"{type(error).__name__}: {error}"}
        result = report.get("result")
        reason = failure_reason(code, report) if code else ""
        if self.adaptive and not code and result is None:
            reason = (
                "no number for the search to optimize: optimized_metric= must name a metric in the run's metrics.json"
            )
        state = f"failed ({code})" if code else "failed" if reason else "done"
        row = JobResult(number, overrides, state, result, time.monotonic() - start, reason)
        if self.rows is not None and os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")) == "0":
            atomic.write_json(self.rows / f"{number}.json", asdict(row))
        if code in STOP_EXIT_CODES:
            raise SystemExit(code)
        if reason:
            print(red(f"job {number + 1} failed: {reason}"), file=sys.stderr)
            if self.adaptive:
                raise RuntimeError(reason)
        return result

    def finish(self) -> int:
        """Raise the task's exception, if any; after a sweep print its table and return 1 if a job failed, else 0."""
        if self.failure is not None:
            raise self.failure
        if self.rows is None:
            return 0
        results = dict(self.resolved_jobs)
        for file in self.rows.glob("*.json"):
            row = JobResult(**json.loads(file.read_text()))
            results[row.job] = row
        for number, overrides in enumerate(self.names):
            results.setdefault(number, JobResult(number, overrides, "failed", reason="it did not finish"))
        code = print_results([results[number] for number in sorted(results)])
        if (file := self.rows.with_name("optimization_results.yaml")).is_file():  # written by Optuna's sweeper
            best = parse_yaml(file.read_text())
            params = " ".join(f"{key}={value}" for key, value in best["best_params"].items())
            print(f"best: {params}  {best['best_value']:.6g}")
        return code


def print_results(rows: Sequence[JobResult]) -> int:
    """Print the outcome of each job; return 1 if one failed, else 0."""
    width = max((len(row.overrides) for row in rows), default=0)
    print("\n" + "\n".join(row.text(width) for row in rows))
    states = [row.state.partition(" ")[0] for row in rows]
    failed, before = states.count("failed"), states.count("skipped")
    more = [f"{before} of them before"] * bool(before) + [f"{failed} failed"] * bool(failed)
    print(", ".join([f"{len(rows) - failed} of {count_jobs(len(rows))} done", *more]), flush=True)
    return int(failed > 0)


def failure_reason(code: int, report: Mapping[str, Any]) -> str:
    """Describe in one line why a job failed: its own error message, else what ended its process."""
    if "error" in report:
        return str(report["error"])
    if code > 128 and code - 128 in set(signal.Signals):
        return f"killed ({signal.Signals(code - 128).name})"
    return f"exit code {code}"


def _report_result(report: Mapping[str, Any]) -> None:
    """Write this job's report for the process that started it, if there is one."""
    if path := os.environ.get("LDM_RESULT"):
        Path(path).write_text(json.dumps(report))


def _devices(cfg: Any) -> int:
    from omegaconf import OmegaConf

    devices = OmegaConf.select(cfg, "trainer.devices")
    return devices if isinstance(devices, int) and not isinstance(devices, bool) else 1
