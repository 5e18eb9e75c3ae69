"""One smoke run, made by the command as a person types it and shared by every test that needs a trained model."""

import os

# Threads cost more than they bring on small tensors; the variable is read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import logging
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from smoke import enliven, process

from ldm.launch.process import RANK_VARIABLES

# Under nohup, or in the background of a script, SIGINT is ignored, and every process that a test starts inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def enabled_loggers() -> None:
    """Undo what a command run in this process did to logging: Hydra disables loggers, a launcher's rank all records."""
    logging.disable(logging.NOTSET)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@dataclass(frozen=True)
class Smoke:
    """folder: where the command ran and its cache lies, which other tests add to.  kept: the cache as that command left
    it.

    run: the run folder.  said: what it printed.
    """

    folder: Path
    kept: Path
    run: Path
    said: str

    @property
    def metrics(self) -> dict[str, Any]:
        return json.loads((self.run / "metrics.json").read_text())


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, worker_id) -> Smoke:
    """`python train.py budget=smoke` with nothing there yet: the judge, the first stage, the diffusion model, samples
    and scores.

    The first test process that asks for it runs the command; each has a copy of its own.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base if worker_id == "master" else base.parent) / "first"
    with FileLock(f"{shared}.lock"):
        if not shared.is_dir():
            made = tmp_path_factory.mktemp("made")
            done = process("train.py", "budget=smoke", cwd=made, timeout=900)
            assert done.returncode == 0, done.stderr
            (made / "said.txt").write_text(re.sub(r"\x1b\[[0-9;]*m", "", done.stdout))
            made.rename(shared)
    folder = shutil.copytree(shared, tmp_path_factory.mktemp("smoke") / "here")
    (run,) = (folder / "runs").iterdir()
    return Smoke(folder, shutil.copytree(folder / "cache", folder / "kept"), run, (folder / "said.txt").read_text())


@pytest.fixture(scope="session")
def lively(smoke, tmp_path_factory) -> Path:
    """The shared run with weights drawn at random: two steps leave a network nearly deaf to what it is told, this one
    hears all.
    """
    run = tmp_path_factory.mktemp("lively") / "run"
    shutil.copytree(smoke.run, run)
    enliven(run)
    return run


@pytest.fixture(scope="session")
def prompted(smoke, tmp_path_factory) -> Path:
    """The shared run told captions instead of labels, by tests/spy.py."""
    run = tmp_path_factory.mktemp("prompted") / "run"
    shutil.copytree(smoke.run, run)
    config = (run / "config.yaml").read_text()
    spied = config.replace("ldm.conditioner.label.Label", "spy.Spy\n  num_classes: 10")
    assert spied != config
    (run / "config.yaml").write_text(spied)
    return run


@pytest.fixture(autouse=True)
def no_rank_left():
    """Lightning leaves LOCAL_RANK in the environment after a test of ddp, and the next one in this process would be
    taken for a rank.
    """
    before = dict(os.environ)
    yield
    for name in RANK_VARIABLES:
        if name not in before:
            os.environ.pop(name, None)
