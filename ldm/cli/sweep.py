"""The jobs of a sweep: what is known of each before it runs, each as a process of its own, and a table of what became of them."""

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
from typing import Any

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
    """What became of a job: done, skipped (it was done before) or failed."""

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
    """The table of a sweep that has not begun: which jobs there are, which are done, how long the others will take."""
    width = max(map(len, jobs), default=0)
    lines = []
    for overrides, one in zip(jobs, known, strict=True):
        if one.metrics is not None:
            took = one.metrics.get("seconds")
            state, more = (
                "done",
                [
                    *([f"{one.result:.6g}"] if one.result is not None else []),
                    *([format_duration(took)] if took else []),
                ],
            )
        else:
            state = f"step {one.steps_done:,}" if one.steps_done else "to run"
            more = [f"about {format_duration(one.seconds)}" if one.seconds is not None else "no run like it"]
        lines.append(f"  {overrides:<{width}}  {state:<14}{'  '.join(more)}")
    left = [one for one in known if one.metrics is None]
    for place, _, numbers in shared_dependencies(known):
        lines.append(f"  {place.parent.name} {place.name} is not there: trained first, for {count_jobs(len(numbers))}")
    found = [one.seconds for one in left if one.seconds is not None]
    total = (
        f"about {sum(found) / 3600 + (len(left) - len(found)) * statistics.mean(found) / 3600:.2g} hours"
        if found
        else ""
    )
    counted = f"{count_jobs(len(known))}, {len(known) - len(left)} done, {len(left)} to run"
    silent = ", for how long nobody knows: no finished run is like them" if left else ""
    return "\n".join([*lines, counted + (f", {total} one after another, as like runs took" if total else silent)])


def count_jobs(number: int) -> str:
    return f"{number} job{'' if number == 1 else 's'}"


def shared_dependencies(known: Sequence[JobStatus]) -> list[tuple[Path, Callable[[], object], list[int]]]:
    """What jobs that are not done need and is not there: its folder, what trains it, and the jobs."""
    found: dict[Path, tuple[Path, Callable[[], object], list[int]]] = {}
    for number, one in enumerate(known):
        for place, train in one.missing_dependencies.items() if one.metrics is None else ():
            found.setdefault(place, (place, train, []))[2].append(number)
    return list(found.values())


def train_dependencies(names: Sequence[str], known: Sequence[JobStatus], train: bool = True) -> dict[int, JobResult]:
    """The jobs that are done, and, after training what the others share, those that now cannot run.

    train: whether to; else the first job that needs it does, and the others wait for it.
    """
    rows = {}
    for number, one in enumerate(known):
        if one.metrics is not None:
            rows[number] = JobResult(number, names[number], "skipped", one.result, reason="it was done before")
    for place, call, numbers in shared_dependencies(known) if train else ():
        print(f"\nfirst, for {count_jobs(len(numbers))}: {place.parent.name} {place.name}", flush=True)
        try:
            call()
        except UserError as error:
            print(red(f"{place.parent.name} {place.name} failed: {error}"), file=sys.stderr)
            rows |= {
                number: JobResult(number, names[number], "failed", reason=f"{place.parent.name} {place.name} failed")
                for number in numbers
            }
    return rows


@dataclass
class SweepJob:
    """What Hydra calls with each composed config: the task itself, or a job of a sweep, or one on several devices, as its own process.

    rows: where jobs leave what became of them, whatever process calls this.  names: the overrides of each job, where they are known before.
    settled: jobs that need not run, or cannot.  learning: whether the sweeper chooses jobs by the results of others.
    sweep: its name.  gpus: those that the jobs share, one each.
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
        now = HydraConfig.get()
        devices = _devices(cfg)
        if now.mode is not None and now.mode.name == "MULTIRUN":
            overrides = name_job(OmegaConf.to_container(now.overrides.task, resolve=False))  # as typed, ${...} included
            return self._run_sweep_job(cfg, self._number(now.job.num, overrides), overrides, devices)
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
            said = user_error_message(error) or f"{type(error).__name__}: {error}"
            _report_result({"error": " ".join(said.split())})
            self.failure = error  # raised by end(): on the way through Hydra it would be printed a second time
            return None

    def _run_subprocess(self, cfg: Any, devices: int) -> tuple[int, dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="ldm-job-") as folder:
            serialize.write_config(resolved_config(cfg), Path(folder), current_choices())
            told = Path(folder) / "told.json"
            env = {"LDM_RESULT": str(told)} | ({"LDM_SWEEP": self.sweep} if self.sweep else {})
            with gpus.acquire_gpus(self.gpus, devices) as pinned:
                code = process.run_in_subprocess(self.script, Path(folder), devices, env | pinned)
            return code, json.loads(told.read_text()) if told.is_file() else {}

    def _number(self, number: int, overrides: str) -> int:
        """Return where a job stands among the announced ones, by its overrides; Hydra's own number where none were announced.

        Raises RuntimeError for a job that was not announced.
        """
        if not self.names or (number < len(self.names) and self.names[number] == overrides):
            return number
        if overrides not in self.names:
            raise RuntimeError(f"the job {overrides!r} is none of the {len(self.names)} that were announced")
        return self.names.index(overrides)

    def _run_sweep_job(self, cfg: Any, number: int, overrides: str, devices: int) -> Any:
        of = f" of {len(self.names)}" if self.names else ""
        if number in self.resolved_jobs:
            print(f"\njob {number + 1}{of}, {self.resolved_jobs[number].state}: {overrides}", flush=True)
            return self.resolved_jobs[number].result
        print(f"\njob {number + 1}{of}: {overrides}", flush=True)
        start = time.monotonic()
        if process.is_launched_rank():  # a rank that a cluster started
            code, told = 0, {"result": self.task(cfg)}
        else:
            try:
                code, told = self._run_subprocess(cfg, devices)
            except Exception as error:  # it never began, and a search would leave it out of its table
                code, told = 1, {"error": user_error_message(error) or f"{type(error).__name__}: {error}"}
        result = told.get("result")
        reason = failure_reason(code, told) if code else ""
        if self.adaptive and not code and result is None:
            reason = "no number for the search to go by: optimize= must name one of the run's metrics.json"
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
        """Raise what the task raised; after a sweep print its table and return 1 if a job failed."""
        if self.failure is not None:
            raise self.failure
        if self.rows is None:
            return 0
        found = dict(self.resolved_jobs)
        for file in self.rows.glob("*.json"):
            row = JobResult(**json.loads(file.read_text()))
            found[row.job] = row
        for number, overrides in enumerate(self.names):
            found.setdefault(number, JobResult(number, overrides, "failed", reason="it never came to its end"))
        code = print_results([found[number] for number in sorted(found)])
        if (best := self.rows.with_name("optimization_results.yaml")).is_file():  # a search's
            found_best = parse_yaml(best.read_text())
            print(
                f"best: {' '.join(f'{key}={value}' for key, value in found_best['best_params'].items())}  {found_best['best_value']:.6g}"
            )
        return code


def print_results(rows: Sequence[JobResult]) -> int:
    """Print what became of each job; 1 if one failed, else 0."""
    width = max((len(row.overrides) for row in rows), default=0)
    print("\n" + "\n".join(row.text(width) for row in rows))
    states = [row.state.partition(" ")[0] for row in rows]
    failed, before = states.count("failed"), states.count("skipped")
    more = [f"{before} of them before"] * bool(before) + [f"{failed} failed"] * bool(failed)
    print(", ".join([f"{len(rows) - failed} of {count_jobs(len(rows))} done", *more]), flush=True)
    return int(failed > 0)


def failure_reason(code: int, told: Mapping[str, Any]) -> str:
    """One line: what a failed job said, or what ended it."""
    if "error" in told:
        return str(told["error"])
    if code > 128 and code - 128 in set(signal.Signals):
        return f"killed ({signal.Signals(code - 128).name})"
    return f"exit code {code}"


def _report_result(what: Mapping[str, Any]) -> None:
    """Let the process that started this one know."""
    if place := os.environ.get("LDM_RESULT"):
        Path(place).write_text(json.dumps(what))


def _devices(cfg: Any) -> int:
    from omegaconf import OmegaConf

    devices = OmegaConf.select(cfg, "trainer.devices")
    return devices if isinstance(devices, int) and not isinstance(devices, bool) else 1
