"""Entry point of train.py and sample.py.

Hydra composes the config; a user error is one line with exit code 2; every job of a sweep is its own process.
Exit codes: 0 done, 1 a bug or a failed job of a sweep, 2 an error the user can fix, 3 non-finite numbers, 85 preempted
(the same command resumes), 130 interrupted; other codes of sys.exit in the task are passed on.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Collection
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from ldm.cli.errors import run_guarded
from ldm.config.compose import Composition, drop_hydra_node
from ldm.config.overrides import ConfigSearchPath, expand_group_list, help_text, normalize_override
from ldm.errors import UserError
from ldm.launch import process


def run_command(
    task: Callable[..., Any],
    config_name: str,
    *,
    text: Collection[str] = ("prompt",),
    paths: Collection[str] = ("run",),
    ahead: Callable[[Any], Any] | None = None,
) -> None:
    """Run the script that defines task(cfg) as a command with the config conf/<config_name>.yaml next to it.

    text: keys with a literal value, which arrives as typed.  paths: the same, but `null` is null.
    ahead: returns the ldm.runs.status.JobStatus of a composed config, so that a sweep can skip finished jobs and train
        shared dependencies first.
    Heavy imports belong inside the task, which starts after the config has been validated.  Does not return.
    """
    script = Path(task.__code__.co_filename).resolve()
    with _preemptible(), _rank():
        sys.exit(run_guarded(lambda: _main(task, script, config_name, text, paths, ahead)))


def _main(
    task: Callable,
    script: Path,
    config_name: str,
    text: Collection[str],
    paths: Collection[str],
    ahead: Callable[[Any], Any] | None,
) -> int:
    argv = sys.argv[1:]
    if {"--help", "-h"} & set(argv):
        print(help_text(script.parent / "conf", config_name, sys.modules["__main__"].__doc__ or ""))
        return 0
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through instead of Hydra's report and exit code 1

    import hydra

    import ldm.config.search_path  # noqa: F401  registers experiments/ as a config group
    from ldm.cli import sweep
    from ldm.compat import get_args_parser

    parser = get_args_parser()
    parser.error = _parser_error  # type: ignore[assignment, method-assign]
    args = parser.parse_intermixed_args(argv)  # flags may come after overrides
    folder = Path(args.config_path).absolute() if args.config_path else script.parent / "conf"
    if not (folder / f"{args.config_name or config_name}.yaml").is_file():
        raise UserError(f"no config {args.config_name or config_name}.yaml in {folder}")
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: no such folder")
    extra = (Path(args.config_dir).absolute(),) if args.config_dir else ()
    tree = ConfigSearchPath((folder, *extra), script.parent)
    typed = [normalize_override(one, tree, text, paths, args.multirun) for one in args.overrides]
    plan = Composition(
        tree,
        args.config_name or config_name,
        args.multirun,
        [one for override in typed for one in expand_group_list(override, tree)],
    )
    job = sweep.SweepJob(task, script)
    flags = [
        f"--{name.replace('_', '-')}" for name in ("resolve", "shell_completion", "hydra_help") if getattr(args, name)
    ]
    flags += [
        part
        for name in ("cfg", "package", "info")
        if getattr(args, name)
        for part in (f"--{name}", getattr(args, name))
    ]
    with plan.translate_errors(job), tempfile.TemporaryDirectory(prefix="ldm-sweep-") as scratch:
        configs = [] if flags else plan.check()
        if not flags and plan.first_config.get("dry_run"):
            known = [_job_status(config, ahead) for config in configs]
            forecast = sweep.format_forecast(plan.names, known)
            print(forecast if plan.enumerable else "the sweeper chooses its jobs as it goes: there is nothing to list")
            return 0
        if plan.multirun and not flags:
            job.rows, job.names = plan.sweep_dir(scratch) / "rows", plan.names
            job.adaptive, job.gpus = not plan.enumerable, plan.gpus
            job.sweep = plan.sweep_name
            shutil.rmtree(job.rows, ignore_errors=True)  # from an earlier start in the same hydra.sweep.dir
            job.resolved_jobs = sweep.train_dependencies(
                plan.names, [_job_status(config, ahead) for config in configs], train=plan.runs_locally
            )
        sys.argv = [
            str(script),
            *flags,
            *(["--multirun"] if args.multirun else []),
            *plan.written,
            *plan.hydra_overrides(script, scratch),
        ]
        plan.launched = plan.multirun
        try:
            hydra.main(config_path=str(folder), config_name=plan.name, version_base="1.3")(job)()
        except Exception as error:
            if job.rows is None or not job.rows.is_dir():
                raise
            print(f"the sweep was aborted: {' '.join(str(error).split())}", file=sys.stderr)
            return job.finish() or 1
        return job.finish()


def _job_status(config: Any, ahead: Callable[[Any], Any] | None) -> Any:
    """Return `ahead`'s status of a composed config, which it receives as the task would."""
    from hydra.core.hydra_config import HydraConfig

    from ldm.runs.status import JobStatus

    if ahead is None:
        return JobStatus()
    HydraConfig.instance().set_config(config)
    bare = drop_hydra_node(config)
    with redirect_stdout(None):
        return ahead(bare)


def _parser_error(message: str) -> None:
    raise UserError(f"{message} (see --help)")


@contextmanager
def _preemptible():
    """Exit with code 85 (requeue) on SIGTERM or SIGUSR1; training handles these itself, to save a checkpoint first."""

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
    """Under run_in_subprocess: report this rank's process id and exit code, and exit when the parent is gone."""
    world, parent = os.environ.get("LDM_WORLD"), os.environ.pop("LDM_PARENT", None)
    if parent:
        threading.Thread(target=process.exit_with_parent, args=(int(parent),), daemon=True).start()
    with process.report_rank(Path(world)) if world else nullcontext():
        yield
