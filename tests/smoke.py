"""The commands as a person types them, in this process where that is enough: a new one imports for seconds."""

import logging
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@contextmanager
def here(folder: Path, **env: str) -> Iterator[None]:
    """Within the block this is the working directory, everything that is kept lies below it, and nothing is fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {"LDM_CACHE": str(folder / "cache"), "LDM_OFFLINE": "1", **env}.items():
            patch.setenv(name, value)
        patch.setattr("ldm.launch.process.run_in_subprocess", in_process)
        yield


def command(script: str, *typed: str) -> int:
    """The exit code of `python SCRIPT TYPED`, run in this process; commands may start commands."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    whole, config = GlobalHydra.instance(), HydraConfig.instance()
    kept = whole.hydra, config.cfg
    whole.hydra = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(ROOT / script), *typed])
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            whole.hydra, config.cfg = kept
            for one in logging.root.manager.loggerDict.values():  # Hydra silences those that exist already
                if isinstance(one, logging.Logger):
                    one.disabled = False
    raise AssertionError(f"{script} did not end by sys.exit")


def in_process(script: Path, folder: Path, devices: int = 1, env: Mapping[str, str] | None = None) -> int:
    """As ldm.launch.process.run_in_subprocess, but for one device and without a process of its own."""
    assert devices == 1
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        return command(script.name, "--config-path", str(folder), "--config-name", "config")


def train(*typed: str) -> Path:
    """The run folder that `python train.py budget=smoke runs=runs TYPED` leaves in the working directory."""
    before = set(Path("runs").glob("*")) if Path("runs").is_dir() else set()
    assert command("train.py", "budget=smoke", *typed) == 0
    made = set(Path("runs").glob("*")) - before
    assert len(made) == 1, made
    return made.pop().absolute()


def enliven(run: Path) -> None:
    """Give a run weights drawn at random, its first stage too, so that its network hears all that it is told."""
    import torch

    from ldm.checkpoint.latent_space import LatentSpace
    from ldm.checkpoint.load import load_run_config
    from ldm.config import build
    from ldm.io import atomic

    generator = torch.Generator().manual_seed(0)
    for file in (run / "first_stage.safetensors", run / "weights.safetensors"):
        state = atomic.read_tensors(file)
        for name, value in state.items():
            if name not in ("shift", "scale", "calibrated_on"):
                size = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
                state[name] = torch.randn(value.shape, generator=generator) * size + float(
                    "norm" in name and name.endswith("weight")
                )
        if file.stem == "first_stage":
            node = load_run_config(run).autoencoder
            autoencoder = build.build_autoencoder(node, channels=1)
            autoencoder.load_state_dict(state)
            space = LatentSpace.from_autoencoder(autoencoder, build.to_container(node))
        atomic.write_tensors(file, state, space.metadata)


def process(script: str, *typed: str, cwd: Path, timeout: float = 600, **env: str) -> subprocess.CompletedProcess:
    """`python SCRIPT TYPED` as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LDM_CACHE": str(cwd / "cache"), "LDM_OFFLINE": "1", **env}
    line = [sys.executable, str(ROOT / script), *typed]
    return subprocess.run(
        line, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )


def processes(
    *jobs: tuple[str, ...],
    cwd: Path,
    kill_at: int | None = None,
    kill: int = signal.SIGKILL,
    harm: Callable[[int], None] | None = None,
    **env: str,
) -> list[subprocess.CompletedProcess]:
    """Commands (script, *typed) run at once, as the ranks of one world if there are several; what they print is all in
    stdout.

    Each is a process of its own, forked from one that has imported everything.
    kill_at: the training step after which the signal `kill` comes.  harm: called with each one's rank before its
    command runs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["ldm.recipes.diffusion", "ldm.sampling.run", "ldm.evaluation.evaluate", "hydra", "torchmetrics.image"]
    )
    world = {"WORLD_SIZE": str(len(jobs)), "LOCAL_WORLD_SIZE": str(len(jobs)), "GROUP_RANK": "0"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "TORCHELASTIC_RUN_ID": "test"}
    children = []
    for rank, job in enumerate(jobs):
        own = {"LDM_CACHE": str(cwd / "cache"), **env}
        if len(jobs) > 1:
            own |= {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(
            context.Process(target=_child, args=(job, cwd, own, kill_at, kill, harm and partial(harm, rank)))
        )
        children[-1].start()
    for child in children:
        child.join(600)
        if child.is_alive():
            child.kill()
            child.join()
    said = [(cwd / f"said-{rank}.txt").read_text() for rank in range(len(jobs))]
    return [
        subprocess.CompletedProcess(job, child.exitcode, out)
        for job, child, out in zip(jobs, children, said, strict=True)
    ]


def port() -> int:
    """One that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(
    job: tuple[str, ...],
    cwd: Path,
    env: dict[str, str],
    kill_at: int | None,
    kill: int,
    harm: Callable[[], None] | None,
) -> None:
    os.environ.update(env)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of those that read data, as where a person starts the command
    with open(cwd / f"said-{env.get('RANK', 0)}.txt", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    with here(cwd, LDM_CACHE=env["LDM_CACHE"]):
        if kill_at is not None:
            from ldm.training.callbacks import MetricsRecorder

            write = MetricsRecorder.on_train_batch_end

            def record(self, trainer, lit, outputs, batch, batch_idx):
                write(self, trainer, lit, outputs, batch, batch_idx)
                if batch["step"] + 1 == kill_at:
                    os.kill(os.getpid(), kill)

            MetricsRecorder.on_train_batch_end = record
        if harm is not None:
            harm()
        sys.exit(command(*job))


@cache
def composed(*typed: str, name: str = "train") -> Any:
    """The config of a command after the strict check, for building parts of it here."""
    from omegaconf import OmegaConf

    import ldm.config.search_path  # noqa: F401
    from ldm.config.validate import validate

    plan = plan_of(*typed, name=name)
    config = plan.compose(plan.overrides)
    bare = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    validate(OmegaConf.to_container(bare, resolve=True))
    return bare


def plan_of(*typed: str, name: str = "train") -> Any:
    """What a command is about to run."""
    import ldm.config.search_path  # noqa: F401
    from ldm.config.compose import Composition
    from ldm.config.overrides import ConfigSearchPath, expand_group_list, normalize_override

    tree, sweep = ConfigSearchPath((ROOT / "conf",), ROOT), "-m" in typed
    written = [normalize_override(one, tree, ("prompt",), ("run",), sweep) for one in typed if one != "-m"]
    return Composition(tree, name, sweep, [one for override in written for one in expand_group_list(override, tree)])


def first_job(*typed: str) -> tuple[str, ...]:
    """The command line, fit to run alone, of the first of the jobs that a command stands for."""
    plan = plan_of(*typed)
    (job, *others) = plan.job_overrides()
    alone = ("hydra.mode=RUN", "hydra.sweeper.params=null") if others or plan.multirun else ()
    return (
        *(word.replace("experiments=", "experiment=", 1) if word.startswith("experiments=") else word for word in job),
        *alone,
    )
