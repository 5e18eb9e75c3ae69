"""Compose the jobs of a command line and check them without running them."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm.config.build import to_container
from ldm.config.cached_compose import compose_config
from ldm.config.overrides import (
    ConfigSearchPath,
    did_you_mean,
    escape,
    expand_group_list,
    explain_override_error,
    format_choices,
    normalize_override,
    quote,
)
from ldm.config.sweeps import name_job, take_first, write_sweep
from ldm.errors import UserError
from ldm.launch import gpus

ROOT = Path(__file__).resolve().parents[2]

LITERAL_KEYS = ("prompt", "negative", "source_prompt", "precision")

PATH_KEYS = (
    "run",
    "runs",
    "output_dir",
    "init",
    "resume",
    "label",
    "prompts",
    "data.path",
    "data.captions",
    "guidance.classifier",
)


@dataclass(frozen=True)
class ComposedJob:
    """One job: its overrides, its config as the command would receive it, and the option chosen in each group."""

    overrides: Sequence[str]
    cfg: Any
    choices: Mapping[str, str]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config as plain data with interpolations resolved."""
        return to_container(self.cfg)

    def lookup(self, key: str) -> Any:
        """Return the option chosen in a group, or the value at a dotted key of the config; None if there is neither."""
        node: Any = self.choices.get(key, self.config)
        if key in self.choices:
            return node
        for name in key.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        return node


def compose_jobs(script: str, typed: Sequence[str], config_dir: Path | None = None) -> list[ComposedJob]:
    """Compose the jobs of `python SCRIPT.py -m TYPED`, in its order.

    config_dir: that of `--config-dir`.  Raises UserError for what the command would refuse.
    """
    from omegaconf import OmegaConf

    import ldm.config.search_path  # noqa: F401  registers experiments/ as a config group
    from ldm.config.validate import validate

    tree = ConfigSearchPath((ROOT / "conf", *([config_dir.absolute()] if config_dir else [])), ROOT)
    written = [normalize_override(one, tree, LITERAL_KEYS, PATH_KEYS, True) for one in typed]
    plan = Composition(tree, script, True, [one for override in written for one in expand_group_list(override, tree)])
    jobs = []
    with plan.translate_errors(SimpleNamespace(started=False)):  # type: ignore[arg-type]
        for overrides in plan.job_overrides():
            config = plan.compose(overrides)
            chosen = {
                name: option
                for name, option in config.hydra.runtime.choices.items()
                if option is not None and "/" not in name
            }
            jobs.append(
                ComposedJob(
                    overrides, OmegaConf.masked_copy(config, [name for name in config if name != "hydra"]), chosen
                )
            )
            validate(jobs[-1].config)
    return jobs


def compose_option(group: str, option: str, folder: Path = ROOT / "conf") -> Any:
    """Return the node of one option of a group as a config, composed with the base files that it names.

    Interpolations of other groups, as `${weighting}`, stay unresolved.  Raises UserError for an unknown option.
    """
    from omegaconf import OmegaConf

    options = ConfigSearchPath((folder,), ROOT).groups().get(group, [])
    if option not in options:
        raise UserError(f"{group}={option}: no such option{did_you_mean(option, options)}{format_choices(options)}")
    config = drop_hydra_node(compose_config(folder, f"{group}/{option}", ()))
    # Returned as a root of its own, since a node of the composed config refuses new keys. An option with
    # `@package _global_` sets other keys as well.
    return OmegaConf.create(OmegaConf.to_container(config.get(group, config)))


# Keep Hydra from writing files.
NO_HYDRA_OUTPUT = (
    "hydra/job_logging=disabled",
    "hydra/hydra_logging=disabled",
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
)


def current_choices() -> dict[str, str]:
    """Return group -> option of the running job: {"schedule": "cosine", ...}.

    Also works where a sweep or a launcher passed on an already composed config.
    """
    from hydra.core.hydra_config import HydraConfig

    runtime = HydraConfig.get().runtime
    for source in runtime.config_sources:
        if source.provider == "main" and (file := Path(source.path) / "choices.json").is_file():
            return json.loads(file.read_text())
    return {
        group: option
        for group, option in runtime.choices.items()
        if option is not None and not group.startswith("hydra/")
    }


@dataclass
class Composition:
    """A command line to be run: the config, its overrides, and whether they stand for several jobs."""

    tree: ConfigSearchPath
    name: str
    multirun: bool
    overrides: list[str]
    enumerable: bool = True  # the jobs are known before the first one starts
    runs_locally: bool = True  # on this machine
    sequential: bool = True  # jobs run one after another in this process
    names: list[str] = field(default_factory=list)
    swept: set[str] = field(default_factory=set)  # keys and groups that the command line varies
    gpus: tuple[str, ...] = ()
    first_config: Any = None
    launched: bool = False  # Hydra has started running the jobs
    written: list[str] = field(
        default_factory=list
    )  # the overrides passed to Hydra, which expand to the jobs in `names`

    def __post_init__(self) -> None:
        self.written = self.overrides

    def compose(self, overrides: list[str]) -> Any:
        """Return the composed config, including its `hydra` node."""
        folder, *others = self.tree.folders
        sources = (*others, self.tree.root / "experiments")
        return compose_config(folder, self.name, overrides, self.tree.search_path(), sources)

    def check(self) -> list[Any]:
        """Compose and validate each job's config before the first one starts.  Raises UserError."""
        from ldm.config.validate import validate

        configs, bases = [], dict[tuple[str, ...], Any]()
        for overrides in self.job_overrides():
            config = self.compose(overrides)
            added = [override for override in overrides if re.match(r"\+\w+@", override)]  # by expand_group_list
            known = {override[1:].partition("=")[0] for override in added}
            choices = config.hydra.runtime.choices.items()
            chosen = added + [
                f"{group}={quote(option)}"
                for group, option in choices
                if _is_group_choice(group, option) and group not in known
            ]
            if overrides and (key := tuple(chosen)) not in bases:  # jobs that choose the same options share it
                bases[key] = resolved_config(self.compose(chosen), missing=True)
            validate(resolved_config(config), bases[tuple(chosen)] if overrides else None)
            configs.append(config)
        return configs

    def job_overrides(self) -> list[list[str]]:
        """Return the overrides of each job.

        Empty for a sweeper that proposes values as it goes; its jobs are validated when they start.
        """
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from ldm.compat import BasicSweeper

        parse = OverridesParser.create().parse_overrides
        typed = parse(self.overrides)
        firsts = [(one, take_first(one, self.tree.options)) for one in typed]
        first = self.compose([line for _, line in firsts if line])
        self.multirun = self.multirun or (first.hydra.mode is not None and first.hydra.mode.name == "MULTIRUN")
        self.enumerable = "basic" in first.hydra.sweeper._target_
        self.runs_locally, self.sequential = (
            "submitit_folder" not in first.hydra.launcher,
            "basic" in first.hydra.launcher._target_,
        )
        self.first_config = first
        if not self.multirun:
            self.names = [" ".join(self.overrides)]
            return [self._single(typed)]
        if first.hydra.runtime.choices.get("hydra/launcher") == "gpus":
            self.gpus = gpus.idle_gpus()
        self.swept = {one.key_or_group for one in typed if one.is_sweep_override()}
        if "experiments" in self.swept:
            # Hydra's sweeper does not know the group `experiments`.
            first = self.compose([line for one, line in firsts if line and one.key_or_group != "experiments"])
        params = parse([f"{key}={value}" for key, value in (first.hydra.sweeper.params or {}).items()])
        self.written, swept = write_sweep(params, typed, first.hydra.sweeper, self.tree.options)
        if not self.enumerable:
            return []
        jobs = BasicSweeper.split_arguments([one for one in parse(swept) if not one.is_hydra_override()], None)[0]
        self.names = [name_job(job) for job in jobs]
        return jobs

    @property
    def sweep_name(self) -> str:
        """The sweep's name: its study's, else the value of name=, else the keys that it varies.

        A study or a name that the sweep varies is of its first job alone.
        """
        study = "" if "experiments" in self.swept else self.first_config.hydra.runtime.choices.get("experiments") or ""
        name = None if "name" in self.swept else self.first_config.get("name")
        over = [one.partition("=")[0] for one in self.overrides if not one.startswith("hydra.")]
        return str(study.removesuffix("/sweep") or name or ",".join(over))[:128]

    def sweep_dir(self, scratch: str) -> Path:
        """Return the folder for Hydra's own files of a sweep: temporary, unless other machines have to read them."""
        return Path(scratch) if self.runs_locally else Path(self.first_config.hydra.sweep.dir).absolute()

    def _single(self, typed: list[Any]) -> list[str]:
        for override in typed:
            if override.is_sweep_override():
                raise UserError(f"{override.input_line} is a sweep over several values: add -m, or quote the value")
        return self.overrides

    def hydra_overrides(self, script: Path, scratch: str) -> list[str]:
        """Return the overrides that keep Hydra's files and logs off the disk, except those that the user set."""
        ours = [*NO_HYDRA_OUTPUT, f"hydra.job.name={script.stem}", *self.tree.search_path()]
        if self.multirun and self.first_config is not None:
            ours += [f"hydra.sweep.dir={quote(escape(str(self.sweep_dir(scratch))))}", "hydra.sweep.subdir=."]
            ours += [f"hydra.launcher.n_jobs={len(self.gpus)}"] * bool(self.gpus)
            # A failed job must not stop the others.
            ours += ["hydra.sweeper.max_failure_rate=1.0"] * ("max_failure_rate" in self.first_config.hydra.sweeper)
        typed = {override.partition("=")[0] for override in self.overrides}
        return [override for override in ours if override.partition("=")[0] not in typed]

    @contextmanager
    def translate_errors(self, job: Any):
        """Raise any error that occurs before the task starts as one UserError.

        job: has `started`, true once the task runs.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if job.started or (self.launched and not self.sequential):
                raise
            raise UserError(
                explain_override_error(
                    error,
                    self.overrides,
                    self.tree,
                    lambda some: resolved_config(self.compose(some), missing=True),
                    self.multirun,
                )
            ) from error


def _is_group_choice(group: str, option: Any) -> bool:
    return isinstance(option, str) and group != "experiments" and not group.startswith("hydra/")


def drop_hydra_node(config: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def resolved_config(config: Any, missing: bool = False) -> dict[str, Any]:
    """Return the config as resolved plain data, without Hydra's node.

    missing: accept mandatory values that are not set, and resolve nothing.
    Raises UserError for a mandatory value that is not set, unless `missing`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    try:
        return OmegaConf.to_container(drop_hydra_node(config), resolve=not missing, throw_on_missing=not missing)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key}=... must be given (see --help)") from None
