"""How train.py and sample.py start: Hydra composes, a mistake is one line and exit code 2, and every job of a sweep is its own process.

Exit codes: 0 done, 1 a bug or a failed job of a sweep, 2 a mistake the person can mend, 3 numbers no longer finite, 85 preempted (the same
command goes on), 130 interrupted; the task's own sys.exit stays.
"""

import errno
import json
import linecache
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm import launch
from ldm.argv import Tree, describe, escape, explain, quote, rewrite, several
from ldm.errors import NonFiniteError, UserError

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)  # full, or not ours to write
STOPPED = (85, 130, 143)  # preempted, Ctrl-C, terminated: a sweep ends instead of going on to its next job
QUIET = ("hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.run.dir=.", "hydra.output_subdir=null")  # nothing on disk


def command(
    task: Callable[..., Any],
    config_name: str,
    *,
    text: Collection[str] = ("prompt",),
    paths: Collection[str] = ("run",),
    supplied: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Run the script that defines task(cfg) as a command with the config conf/<config_name>.yaml beside it; does not return.

    text: keys whose value arrives as typed, whatever it is.  paths: the same, but `null` is null.
    supplied: `_target_` -> the parameters that the task passes itself, which a config need not hold.
    The task must import what is heavy inside itself: it runs after the config was found right.
    """
    script = Path(task.__code__.co_filename).resolve()
    with _preemptible(), _rank():
        sys.exit(guarded(lambda: _start(task, script, config_name, text, paths, supplied or {})))


def choices() -> dict[str, str]:
    """Group -> option of the running job, also where a sweep or a launcher handed the composed config on: {"schedule": "cosine", ...}."""
    from hydra.core.hydra_config import HydraConfig

    runtime = HydraConfig.get().runtime
    for source in runtime.config_sources:
        if source.provider == "main" and (kept := Path(source.path) / "choices.json").is_file():
            return json.loads(kept.read_text())
    return {group: option for group, option in runtime.choices.items() if option is not None and not group.startswith("hydra/")}


def guarded(run: Callable[[], Any]) -> int:
    """The exit code of run(), its mistakes printed in one line."""
    try:
        return int(run() or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        said, code = (str(error), 3) if isinstance(error, NonFiniteError) else (mistake(error), 2)
        if said is None or "LDM_TRACEBACK" in os.environ:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename == __file__:
                trace = trace.tb_next  # from the task on
            traceback.print_exception(type(error), error, trace)
        if said is None:
            return 1
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {' '.join(said.split())}", file=sys.stderr)
        return code


def mistake(error: BaseException) -> str | None:
    """The text of an error a person can mend, None for a bug."""
    if isinstance(error, UserError | FileNotFoundError) or (isinstance(error, OSError) and error.errno in DISK):
        return str(error)
    cause = error.__cause__
    if type(error).__name__ == "InstantiationException" and cause is not None:  # Hydra's, around what a constructor raised
        said = mistake(cause)
        key = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
        return f"{said} (in {key[1]})" if said and key else said
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if isinstance(error, ValueError) and trace is not None:  # raised on purpose by our own code, which says what to do
        file = trace.tb_frame.f_code.co_filename
        ours = Path(file).is_relative_to(Path(__file__).parent)
        if ours and linecache.getline(file, trace.tb_lineno).lstrip().startswith("raise"):
            return str(error)
    return None


def _start(task: Callable, script: Path, config_name: str, text: Collection[str], paths: Collection[str], supplied: Mapping) -> int:
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        print(describe(script.parent / "conf", config_name, sys.modules["__main__"].__doc__ or ""))
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that exceptions come out instead of Hydra's report and exit code 1

    import hydra
    from hydra._internal.utils import get_args_parser

    import ldm.studies  # noqa: F401  makes experiments/ a group

    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[assignment, method-assign]
    args = parser.parse_args(argv)
    folder = Path(args.config_path).absolute() if args.config_path else script.parent / "conf"
    if not (folder / f"{args.config_name or config_name}.yaml").is_file():
        raise UserError(f"no config {args.config_name or config_name}.yaml in {folder}")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: no such folder")
    extra = (Path(args.config_dir).absolute(),) if args.config_dir else ()
    tree = Tree((folder, *extra), script.parent)
    typed = [rewrite(one, tree, text, paths, args.multirun) for one in args.overrides]
    plan = Plan(tree, args.config_name or config_name, args.multirun, [one for override in typed for one in several(override, tree)])
    job = Job(task, script)
    flags = [f"--{name.replace('_', '-')}" for name in ("resolve", "shell_completion", "hydra_help") if getattr(args, name)]
    flags += [part for name in ("cfg", "package", "info") if getattr(args, name) for part in (f"--{name}", getattr(args, name))]
    with plan.explained(job), tempfile.TemporaryDirectory(prefix="ldm-sweep-") as scratch:
        if not flags:
            plan.check(supplied)
        hydra_overrides = plan.hydra(script, scratch)
        sys.argv = [str(script), *flags, *(["--multirun"] if args.multirun else []), *plan.overrides, *hydra_overrides]
        hydra.main(config_path=str(folder), config_name=plan.name, version_base="1.3")(job)()
    return job.end()


def _refuse(message: str) -> None:
    raise UserError(f"{message} (see --help)")


@dataclass
class Plan:
    """What is about to run: the config, its overrides, and whether they stand for several jobs."""

    tree: Tree
    name: str
    multirun: bool
    overrides: list[str]
    basic: bool = True

    def compose(self, overrides: list[str]) -> Any:
        """The composed config, its `hydra` node included."""
        from hydra import compose, initialize_config_dir

        with initialize_config_dir(str(self.tree.folders[0]), version_base="1.3"):
            return compose(self.name, [*overrides, *self._search()], return_hydra_config=True)

    def check(self, supplied: Mapping[str, Collection[str]]) -> None:
        """Compose and validate each job before the first starts.  Raises UserError."""
        from ldm.validate import validate

        for overrides in self.jobs():
            config = self.compose(overrides)
            added = [override for override in overrides if re.match(r"\+\w+@", override)]  # what `several` made
            known = {override[1:].partition("=")[0] for override in added}
            choices = config.hydra.runtime.choices.items()
            chosen = added + [f"{group}={option}" for group, option in choices if _plain(group, option) and group not in known]
            validate(_composed(config), _composed(self.compose(chosen), missing=True) if overrides else None, supplied)

    def jobs(self) -> list[list[str]]:
        """The overrides of each job; none for a sweep that draws its values as it goes, whose jobs check themselves."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parse = OverridesParser.create().parse_overrides
        typed = parse(self.overrides)
        first = self.compose([one for one in map(_settled, typed) if one])
        self.multirun = self.multirun or (first.hydra.mode is not None and first.hydra.mode.name == "MULTIRUN")
        self.basic = all("basic" in part._target_ for part in (first.hydra.sweeper, first.hydra.launcher))
        if not self.multirun:
            return [self._single(typed)]
        if not self.basic:
            return []
        params = [f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items()]
        return BasicSweeper.split_arguments([one for one in parse([*params, *self.overrides]) if not one.is_hydra_override()], None)[0]

    def _single(self, typed: list[Any]) -> list[str]:
        for override in typed:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line} is a sweep over several values: add -m, or quote the value")
        return self.overrides

    def hydra(self, script: Path, scratch: str) -> list[str]:
        """Overrides that keep Hydra's own files and logs off the disk, unless the person set them."""
        sweep = [f"hydra.sweep.dir={quote(scratch)}", "hydra.sweep.subdir=."] if self.basic else []
        ours = [*QUIET, f"hydra.job.name={script.stem}", *sweep, *self._search()]
        typed = {override.partition("=")[0] for override in self.overrides}
        return [override for override in ours if override.partition("=")[0] not in typed]

    def _search(self) -> list[str]:
        places = [f"studies://{self.tree.root}", *(f"file://{folder}" for folder in self.tree.folders[1:])]
        return [f"hydra.searchpath=[{','.join(quote(escape(place)) for place in places)}]"]

    @contextmanager
    def explained(self, job: "Job"):
        """Turn what is raised before the task runs into one UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if job.started or (self.multirun and not self.basic):
                raise
            raise UserError(
                explain(error, self.overrides, self.tree, lambda some: _composed(self.compose(some), missing=True), self.multirun)
            ) from error


def _settled(override: Any) -> str | None:
    """The override with the first of its values; None for a range that a sweeper draws from."""
    if not override.is_sweep_override():
        return override.input_line
    return f"{override.get_key_element()}={next(override.sweep_string_iterator())}" if override.is_discrete_sweep() else None


def _plain(group: str, option: Any) -> bool:
    return isinstance(option, str) and group != "experiments" and not group.startswith("hydra/")


def _composed(config: Any, missing: bool = False) -> dict[str, Any]:
    """The config as resolved plain data without Hydra's node.  Raises UserError for a value that must be given, unless missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    bare = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(bare, resolve=not missing, throw_on_missing=not missing)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}=... must be given (see --help)") from None


@dataclass
class Job:
    """What Hydra calls with each composed config: the task itself, or the job of a sweep or of several devices as its own process."""

    task: Callable[..., Any]
    script: Path
    started: bool = False
    swept: bool = False
    failure: BaseException | None = None
    rows: list[tuple[str, int, Any, float]] = field(default_factory=list)  # overrides, exit code, result, seconds

    def __post_init__(self) -> None:
        self.__name__, self.__module__ = self.script.stem, __name__

    def __call__(self, cfg: Any) -> Any:
        from hydra.core.hydra_config import HydraConfig

        self.started = True
        now = HydraConfig.get()
        devices = _devices(cfg)
        if now.mode is not None and now.mode.name == "MULTIRUN":
            here = all("basic" in part._target_ for part in (now.sweeper, now.launcher))
            return self.task(cfg) if launch.launched() else self._sweep(cfg, " ".join(now.overrides.task), devices, here)
        if launch.launched():
            return self._run(cfg)
        if devices > 1:
            self.failure = SystemExit(self._process(cfg, devices)[0])
            return None
        return self._run(cfg)

    def _run(self, cfg: Any) -> Any:
        try:
            result = self.task(cfg)
            place = os.environ.get("LDM_RESULT")
            if place and os.environ.get("RANK", "0") == "0":
                Path(place).write_text(json.dumps(result if isinstance(result, int | float) else None))
            return result
        except Exception as error:
            self.failure = error  # raised by end(): on the way through Hydra it would be printed a second time
            return None

    def _process(self, cfg: Any, devices: int) -> tuple[int, Any]:
        with tempfile.TemporaryDirectory(prefix="ldm-job-") as folder:
            launch.write_config(_composed(cfg), Path(folder), choices())
            result = Path(folder) / "result.json"
            code = launch.run_config(self.script, Path(folder), devices, {"LDM_RESULT": str(result)})
            return code, json.loads(result.read_text()) if result.is_file() else None

    def _sweep(self, cfg: Any, overrides: str, devices: int, here: bool) -> Any:
        self.swept = True
        print(f"\njob {len(self.rows) + 1}: {overrides}", flush=True)
        start = time.monotonic()
        code, result = self._process(cfg, devices)
        self.rows.append((overrides, code, result, time.monotonic() - start))
        if code in STOPPED:
            raise SystemExit(code)
        if code:
            print(f"job {len(self.rows)} failed with exit code {code}: {overrides}", file=sys.stderr)
            if not here:  # a launcher in another process, or a sweeper that learns from results, must be told
                raise RuntimeError(f"exit code {code}")
        return result

    def end(self) -> int:
        """Raise what the task raised; after a sweep print its table and return 1 if a job failed."""
        if self.failure is not None:
            raise self.failure
        if not self.swept:
            return 0
        width = max((len(row[0]) for row in self.rows), default=0)
        print()
        for overrides, code, result, seconds in self.rows:
            shown = f"failed ({code})" if code else "" if result is None else f"{result:.6g}"
            print(f"  {overrides:<{width}}  {shown:>12}  {seconds:8.1f} s")
        failed = sum(1 for row in self.rows if row[1])
        print(f"{len(self.rows) - failed} of {len(self.rows)} jobs done" + (f", {failed} failed" if failed else ""))
        return 1 if failed else 0


def _devices(cfg: Any) -> int:
    from omegaconf import OmegaConf

    devices = OmegaConf.select(cfg, "trainer.devices")
    return devices if isinstance(devices, int) and not isinstance(devices, bool) else 1


@contextmanager
def _preemptible():
    """SIGTERM and SIGUSR1 end a command with exit code 85, to be started again; within a training, which sees to them itself, in order."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(85)

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGUSR1)} if main else {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _rank():
    """Under our launcher: tell it this process's id and exit code, and leave when it is gone."""
    world, parent = os.environ.get("LDM_WORLD"), os.environ.pop("LDM_PARENT", None)
    if parent:
        threading.Thread(target=launch.leave_with, args=(int(parent),), daemon=True).start()
    with launch.reported(Path(world)) if world else nullcontext():
        yield
