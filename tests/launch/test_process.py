"""Composed configs as processes of their own: one, two under torch's launcher, and what reaches them and comes back."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ldm.config.serialize import write_config
from ldm.launch.process import is_launched_rank, run_in_subprocess

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from ldm.config.compose import current_choices; from ldm.cli.main import run_command


def main(cfg):
    rank = int(os.environ.get("RANK", 0))
    told = {"world": os.environ.get("WORLD_SIZE", "1"), "prompt": cfg.prompt, "choices": current_choices(), "pid":
    os.getpid()}
    Path(cfg.output_dir, f"{rank}.json").write_text(json.dumps(told))
    if cfg.do == "wait":
        def leave(number, frame):
            time.sleep(0.3 * rank)  # one rank leaves later, as a rank that writes the checkpoint does
            Path(cfg.output_dir, f"{rank}.left").write_text(str(number))
            sys.exit(85)
        signal.signal(signal.SIGTERM, leave)
        signal.signal(signal.SIGUSR1, leave)
        Path(cfg.output_dir, f"{rank}.ready").touch()
        time.sleep(900)
    while cfg.do == "fail" and rank == 1 and not Path(cfg.output_dir, "0.json").is_file():
        time.sleep(0.05)
    if cfg.do == "fail" and rank == 1:
        raise RuntimeError("rank one fails")
    if cfg.do == "fail":
        time.sleep(900)
    return 2.5


if __name__ == "__main__":
    run_command(main, "train", text=("prompt",), paths=("output_dir",))
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("{prompt: '', output_dir: null, do: nothing, trainer: {devices: 1}}")
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    return tmp_path / "train.py"


def config(tmp_path, do="nothing", devices=1):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    plain = {"prompt": "the cat's ${x}, \\", "output_dir": str(out), "do": do, "trainer": {"devices": devices}}
    write_config(plain, tmp_path / "composed", {"schedule": "cosine"})
    return tmp_path / "composed", out


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def wait_for(condition, seconds=600.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def read(out, rank):
    return json.loads((out / f"{rank}.json").read_text())


def test_run_in_subprocess_passes_config_and_choices(script, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")  # of the caller, and not passed on
    assert is_launched_rank()
    composed, out = config(tmp_path)
    assert run_in_subprocess(script, composed) == 0
    told = read(out, 0)
    assert (told["world"], told["prompt"], told["choices"]) == ("1", "the cat's ${x}, \\", {"schedule": "cosine"})


def test_two_ranks_receive_signal_and_exit_in_order(script, tmp_path):
    composed, out = config(tmp_path, "wait", devices=2)
    parent = subprocess.Popen([sys.executable, str(script), "--config-path", str(composed), "--config-name", "config"])
    wait_for(lambda: (out / "0.ready").exists() and (out / "1.ready").exists())
    parent.send_signal(signal.SIGUSR1)
    assert parent.wait(600) == 85
    assert [(out / f"{rank}.left").read_text() for rank in (0, 1)] == [str(int(signal.SIGUSR1))] * 2
    assert all(read(out, rank)["world"] == "2" for rank in (0, 1))
    assert all(gone(read(out, rank)["pid"]) for rank in (0, 1))


def test_failing_rank_ends_other_rank(script, tmp_path):
    composed, out = config(tmp_path, "fail", devices=2)
    done = subprocess.run(
        [sys.executable, str(script), "--config-path", str(composed), "--config-name", "config"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert "RuntimeError: rank one fails" in done.stderr
    assert "ChildFailedError" not in done.stderr
    assert all(gone(read(out, rank)["pid"]) for rank in (0, 1))


def test_ranks_exit_when_parent_is_killed(script, tmp_path):
    composed, out = config(tmp_path, "wait")
    code = f"from ldm.launch.process import run_in_subprocess; run_in_subprocess({str(script)!r}, {str(composed)!r})"
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: (out / "0.ready").exists())
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(read(out, 0)["pid"]))
    assert (out / "0.left").read_text() == str(int(signal.SIGTERM))


def test_run_in_subprocess_returns_code_of_signal(script, tmp_path):
    script.write_text("import os; os.kill(os.getpid(), 9)")
    assert run_in_subprocess(script, config(tmp_path)[0]) == 137
