"""python -m ldm.app: what a person types, and that it answers this machine alone and ends by Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from smoke import ROOT
from test_readme import TYPED

from ldm.app.__main__ import main
from ldm.cli.errors import run_guarded

PAGE = [words for words in TYPED if words[:3] == ["python", "-m", "ldm.app"]]


def test_app_help_needs_no_torch_and_lists_every_key():
    code = "import sys, runpy; sys.argv = ['app', '--help']\ntry: runpy.run_module('ldm.app', run_name='__main__')\n"
    code += "except SystemExit: assert 'torch' not in sys.modules and 'gradio' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for word in ("run=", "compare=null", "host=127.0.0.1", "port=7860", "most_steps=500", "most_megapixels=16.0"):
        assert f"  {word}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "run=... must be given"),
        (["run=nowhere"], "run=nowhere: no such folder"),
        (["run=x", "prot=1"], "prot=1: no key 'prot'; did you mean 'port'?"),
        (["run=x", "port=99999"], "port=99999: expected 0 (any free port) to 65535"),
    ],
)
def test_app_reports_error_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_guarded(lambda: main(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.slow
@pytest.mark.parametrize("typed", PAGE, ids=" ".join)
def test_app_serves_page_until_ctrl_c(typed, smoke, tmp_path):
    (tmp_path / "runs").symlink_to(smoke.folder / "runs")
    words = [
        f"compare={smoke.run}" if word == "compare=RUN" else word for word in typed[3:] if not word.startswith("port=")
    ]
    env = {**os.environ, "LDM_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, *typed[1:3], *words, "port=0"]
    page = subprocess.Popen(line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = next(line for line in page.stdout if "http" in line)
        assert f"{smoke.run.name}: http://127.0.0.1:" in said
        address = said.split()[1]
        with urllib.request.urlopen(address, timeout=600) as answer:
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "http" not in policy
        with urllib.request.urlopen(f"{address}config", timeout=600) as answer:
            config = json.load(answer)
        assert config["analytics_enabled"] is False
        labels = {one["props"].get("label") for one in config["components"]}
        assert {"Run", "Sampler", "Steps", "Guidance", "First seed", "Class"} <= labels
    finally:
        page.send_signal(signal.SIGINT)
        rest = page.communicate(timeout=600)[0]
    assert page.returncode == 0, rest
    assert "Traceback" not in rest
