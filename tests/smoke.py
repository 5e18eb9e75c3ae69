"""The commands as a person types them, in this process where that is enough: a fresh one spends seconds on importing."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@contextmanager
def here(folder: Path, **env: str) -> Iterator[None]:
    """Within the block this is the working directory, everything that is kept lies below it, and nothing is fetched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in {"LDM_CACHE": str(folder / "cache"), "LDM_OFFLINE": "1", **env}.items():
            patch.setenv(name, value)
        patch.setattr("ldm.launch.run_config", in_process)
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
    raise AssertionError(f"{script} did not end by sys.exit")


def in_process(script: Path, folder: Path, devices: int = 1, env: object = None) -> int:
    """As ldm.launch.run_config, but for one device and without a process of its own."""
    assert devices == 1
    return command(script.name, "--config-path", str(folder), "--config-name", "config")


def train(*typed: str) -> Path:
    """The run folder that `python train.py budget=smoke runs=runs TYPED` leaves in the working directory."""
    before = set(Path("runs").glob("*")) if Path("runs").is_dir() else set()
    assert command("train.py", "budget=smoke", *typed) == 0
    made = set(Path("runs").glob("*")) - before
    assert len(made) == 1, made
    return made.pop().absolute()


def process(script: str, *typed: str, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """`python SCRIPT TYPED` as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LDM_CACHE": str(cwd / "cache"), "LDM_OFFLINE": "1", **env}
    line = [sys.executable, str(ROOT / script), *typed]
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
