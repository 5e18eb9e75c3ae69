"""How train.py and sample.py start: Hydra composes, a mistake is one line and exit code 2, and every job of a sweep is its own process.

Exit codes: 0 done, 1 a bug or a failed job of a sweep, 2 a mistake the person can mend, 3 numbers no longer finite, 85 preempted (the same
command goes on), 130 interrupted; the task's own sys.exit stays.
"""

import errno
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm import gpus, launch
from ldm.argv import Tree, describe, escape, explain, quote, rewrite, several
from ldm.errors import NonFiniteError, UserError
from ldm.sweep_overrides import name_job, take_first, write_sweep

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
    ahead: Callable[[Any], Any] | None = None,
) -> None:
    """Run the script that defines task(cfg) as a command with the config conf/<config_name>.yaml beside it; does not return.

    text: keys whose value arrives as typed, whatever it is.  paths: the same, but `null` is null.
    supplied: `_target_` -> the parameters that the task passes itself, which a config need not hold.
    ahead: the ldm.sweep.Known of a composed config, so that a sweep can skip what is done and train first what its jobs share.
    The task must import what is heavy inside itself: it runs after the config was found right.
    """
    script = Path(task.__code__.co_filename).resolve()
    with _preemptible(), _rank():
        sys.exit(guarded(lambda: _start(task, script, config_name, text, paths, supplied or {}, ahead)))


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
            ours = (__file__, str(Path(__file__).with_name("sweep.py")))
            while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename in ours:
                trace = trace.tb_next  # from the task on
            traceback.print_exception(type(error), error, trace)
        if said is None:
            return 1
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' (rank {rank})'}: {' '.join(said.split())}", file=sys.stderr)
        return code


def too_large(error: BaseException) -> str | None:
    """What torch says in many words of a size beyond its numbers or this machine's memory, in few; None of anything else."""
    said = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in said or "not enough memory" in said:
        return "too large for this machine's memory"
    return "a number is too large" if "verflow" in said else None


def mistake(error: BaseException) -> str | None:
    """The text of an error a person can mend, None for a bug."""
    if isinstance(error, UserError | FileNotFoundError) or (isinstance(error, OSError) and error.errno in DISK):
        return str(error)
    cause = error.__cause__
    if type(error).__name__ == "InstantiationException" and cause is not None:  # Hydra's, around what a constructor raised
        said = too_large(cause) or mistake(cause)
        key = re.search(r"^full_key: (\S+)", str(error), re.MULTILINE)
        return f"{said} (in {key[1]})" if said and key else said
    return None


def _start(
    task: Callable,
    script: Path,
    config_name: str,
    text: Collection[str],
    paths: Collection[str],
    supplied: Mapping,
    ahead: Callable[[Any], Any] | None,
) -> int:
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        print(describe(script.parent / "conf", config_name, sys.modules["__main__"].__doc__ or ""))
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that exceptions come out instead of Hydra's report and exit code 1

    import hydra

    import ldm.studies  # noqa: F401  makes experiments/ a group
    from ldm import sweep
    from ldm.compat import get_args_parser

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
    job = sweep.Job(task, script)
    flags = [f"--{name.replace('_', '-')}" for name in ("resolve", "shell_completion", "hydra_help") if getattr(args, name)]
    flags += [part for name in ("cfg", "package", "info") if getattr(args, name) for part in (f"--{name}", getattr(args, name))]
    with plan.explained(job), tempfile.TemporaryDirectory(prefix="ldm-sweep-") as scratch:
        configs = [] if flags else plan.check(supplied)
        if not flags and plan.first.get("dry"):
            known = [_known(config, ahead) for config in configs]
            print(sweep.forecast(plan.names, known) if plan.listed else "a search chooses its jobs as it goes")
            return 0
        if plan.multirun and not flags:
            job.rows, job.names, job.learning, job.gpus = plan.place(scratch) / "rows", plan.names, not plan.listed, plan.gpus
            job.sweep = plan.title
            shutil.rmtree(job.rows, ignore_errors=True)  # of an earlier start in the same hydra.sweep.dir
            job.settled = sweep.prepared(plan.names, [_known(config, ahead) for config in configs], train=plan.near)
        sys.argv = [str(script), *flags, *(["--multirun"] if args.multirun else []), *plan.written, *plan.hydra(script, scratch)]
        plan.launched = plan.multirun
        try:
            hydra.main(config_path=str(folder), config_name=plan.name, version_base="1.3")(job)()
        except Exception as error:
            if job.rows is None or not job.rows.is_dir():
                raise
            print(f"the sweep was broken off: {' '.join(str(error).split())}", file=sys.stderr)
            return job.end() or 1
        return job.end()


def _known(config: Any, ahead: Callable[[Any], Any] | None) -> Any:
    """What `ahead` says of a composed config, which it finds as the task would."""
    from hydra.core.hydra_config import HydraConfig

    from ldm.sweep import Known

    if ahead is None:
        return Known()
    HydraConfig.instance().set_config(config)
    bare = _bare(config)
    with redirect_stdout(None):
        return ahead(bare)


def _refuse(message: str) -> None:
    raise UserError(f"{message} (see --help)")


@dataclass
class Plan:
    """What is about to run: the config, its overrides, and whether they stand for several jobs."""

    tree: Tree
    name: str
    multirun: bool
    overrides: list[str]
    listed: bool = True  # the jobs are known before the first runs
    near: bool = True  # they run on this machine
    alone: bool = True  # one after another, called by this process
    names: list[str] = field(default_factory=list)
    gpus: tuple[str, ...] = ()
    first: Any = None
    launched: bool = False  # Hydra runs the jobs
    written: list[str] = field(default_factory=list)  # the overrides that Hydra is given, whose jobs are `names` whenever it reads them

    def __post_init__(self) -> None:
        self.written = self.overrides

    def compose(self, overrides: list[str]) -> Any:
        """The composed config, its `hydra` node included."""
        from hydra import compose, initialize_config_dir

        with initialize_config_dir(str(self.tree.folders[0]), version_base="1.3"):
            return compose(self.name, [*overrides, *self.tree.search_path()], return_hydra_config=True)

    def check(self, supplied: Mapping[str, Collection[str]]) -> list[Any]:
        """Each job's config, composed and validated before the first starts.  Raises UserError."""
        from ldm.validate import validate

        configs = []
        for overrides in self.jobs():
            config = self.compose(overrides)
            added = [override for override in overrides if re.match(r"\+\w+@", override)]  # what `several` made
            known = {override[1:].partition("=")[0] for override in added}
            choices = config.hydra.runtime.choices.items()
            chosen = added + [f"{group}={quote(option)}" for group, option in choices if _plain(group, option) and group not in known]
            validate(composed(config), composed(self.compose(chosen), missing=True) if overrides else None, supplied)
            configs.append(config)
        return configs

    def jobs(self) -> list[list[str]]:
        """The overrides of each job; none for a sweep that draws its values as it goes, whose jobs check themselves."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from ldm.compat import BasicSweeper

        parse = OverridesParser.create().parse_overrides
        typed = parse(self.overrides)
        firsts = [(one, take_first(one, self.tree.options)) for one in typed]
        first = self.compose([line for _, line in firsts if line])
        self.multirun = self.multirun or (first.hydra.mode is not None and first.hydra.mode.name == "MULTIRUN")
        self.listed = "basic" in first.hydra.sweeper._target_
        self.near, self.alone = "submitit_folder" not in first.hydra.launcher, "basic" in first.hydra.launcher._target_
        self.first = first
        if not self.multirun:
            self.names = [" ".join(self.overrides)]
            return [self._single(typed)]
        if first.hydra.runtime.choices.get("hydra/launcher") == "gpus":
            self.gpus = gpus.free()
        if any(one.key_or_group == "experiments" and one.is_sweep_override() for one in typed):
            first = self.compose(
                [line for one, line in firsts if line and one.key_or_group != "experiments"]
            )  # Hydra's sweeper knows no study
        params = parse([f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items()])
        self.written, swept = write_sweep(params, typed, first.hydra.sweeper, self.tree.options)
        if not self.listed:
            return []
        jobs = BasicSweeper.split_arguments([one for one in parse(swept) if not one.is_hydra_override()], None)[0]
        self.names = [name_job(job) for job in jobs]
        return jobs

    @property
    def title(self) -> str:
        """The sweep's name: its study's, the one that name= gives, or what it is over."""
        study = self.first.hydra.runtime.choices.get("experiments") or ""
        over = [one.partition("=")[0] for one in self.overrides if not one.startswith("hydra.")]
        return str(study.removesuffix("/sweep") or self.first.get("name") or ",".join(over))[:128]

    def place(self, scratch: str) -> Path:
        """Where Hydra's own files of a sweep go: nowhere that lasts, unless other machines are to see them."""
        return Path(scratch) if self.near else Path(self.first.hydra.sweep.dir).absolute()

    def _single(self, typed: list[Any]) -> list[str]:
        for override in typed:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line} is a sweep over several values: add -m, or quote the value")
        return self.overrides

    def hydra(self, script: Path, scratch: str) -> list[str]:
        """Overrides that keep Hydra's own files and logs off the disk, unless the person set them."""
        ours = [*QUIET, f"hydra.job.name={script.stem}", *self.tree.search_path()]
        if self.multirun and self.first is not None:
            ours += [f"hydra.sweep.dir={quote(escape(str(self.place(scratch))))}", "hydra.sweep.subdir=."]
            ours += [f"hydra.launcher.n_jobs={len(self.gpus)}"] * bool(self.gpus)
            ours += ["hydra.sweeper.max_failure_rate=1.0"] * ("max_failure_rate" in self.first.hydra.sweeper)  # a failed job stops no other
        typed = {override.partition("=")[0] for override in self.overrides}
        return [override for override in ours if override.partition("=")[0] not in typed]

    @contextmanager
    def explained(self, job: Any):
        """Turn what is raised before the task runs into one UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if job.started or (self.launched and not self.alone):
                raise
            raise UserError(
                explain(error, self.overrides, self.tree, lambda some: composed(self.compose(some), missing=True), self.multirun)
            ) from error


def _plain(group: str, option: Any) -> bool:
    return isinstance(option, str) and group != "experiments" and not group.startswith("hydra/")


def _bare(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def composed(config: Any, missing: bool = False) -> dict[str, Any]:
    """The config as resolved plain data without Hydra's node.  Raises UserError for a value that must be given, unless missing."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    try:
        return OmegaConf.to_container(_bare(config), resolve=not missing, throw_on_missing=not missing)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}=... must be given (see --help)") from None


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
