"""Logs of whole commands: without a key W&B asks nothing, hinders nothing and leaves no process; a run folder says what
made it.
"""

import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from smoke import ROOT

from ldm.config import serialize
from ldm.runs import metrics_log


def of_home(home: Path) -> list[str]:
    """The processes whose home this is."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"HOME={home}\0".encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # gone, or not ours
            continue
    return [words for words in found if words]


def on_a_terminal(line: list[str], **options) -> tuple[int, str]:
    """Exit code and all that is shown of a command whose input and output are a terminal where nobody types."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, **options)
    os.close(theirs)
    said = bytearray()

    def listen() -> None:
        try:
            while part := os.read(ours, 4096):
                said.extend(part)
        except OSError:  # the terminal was closed
            pass

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        code = child.wait(timeout=600)
    finally:
        child.kill()
    listener.join(60)
    return code, said.decode(errors="replace")


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False], ids=["tty", "no tty"])
def test_training_without_wandb_key_asks_nothing(terminal, smoke, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "LDM"))}
    env = {
        **kept,
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "none"),
        "LDM_CACHE": str(smoke.kept),
        "OMP_NUM_THREADS": "1",
    }
    line = [sys.executable, str(ROOT / "train.py"), "budget=smoke", "metrics=none", "logger=wandb"]
    if terminal:
        code, said = on_a_terminal(line, cwd=tmp_path, env=env)
    else:
        done = subprocess.run(
            line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL
        )
        code, said = done.returncode, done.stdout + done.stderr
    assert code == 0, said
    assert "Enter your choice" not in said
    (run,) = (tmp_path / "runs").iterdir()
    assert [row["step"] for row in metrics_log.read_metrics_log(run / "metrics.jsonl")] == [1, 2]
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    for _ in range(3000):  # its service may take a moment to end
        if not (left := of_home(tmp_path)):
            break
        time.sleep(0.2)
    assert left == []


def test_run_folder_records_provenance(smoke):
    run = smoke.run
    assert {"config.yaml", "choices.json", "provenance.json", "changes.diff", "environment.txt", "log.txt"} <= {
        p.name for p in run.iterdir()
    }
    assert "diffusion   " in (run / "log.txt").read_text()
    assert "torch==" in (run / "environment.txt").read_text()


@pytest.mark.slow
def test_sweep_trains_shared_first_stage_once_and_first(tmp_path, monkeypatch):
    """As a job of its own, before the first: no diffusion model has begun by then, and no job trains one."""
    from smoke import command, here, in_process

    from ldm.launch import process

    begun: list[tuple[str, int]] = []

    def noted(script: Path, folder: Path, devices: int = 1, env: object = None) -> int:
        target = serialize.load_config(folder / "config.yaml")["training"]["_target_"]
        begun.append((target, len(list(tmp_path.glob("runs/*/metrics.jsonl")))))
        return in_process(script, folder, devices, env)

    with here(tmp_path):
        monkeypatch.setattr(process, "run_in_subprocess", noted)
        assert command("train.py", "-m", "budget=smoke", "metrics=none", "seed=1,2") == 0
    job, first = ("ldm.recipes.diffusion.DiffusionRecipe", "ldm.recipes.autoencoder.AutoencoderRecipe")
    assert [target for target, _ in begun] == [first, job, job]
    assert begun[0] == (first, 0)
    assert len(list(tmp_path.glob("runs/*/metrics.json"))) == 2
