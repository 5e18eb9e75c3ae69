"""python -m ldm.animate: what a person types, without torch until something is drawn."""

import subprocess
import sys

import pytest
from PIL import Image
from smoke import ROOT

from ldm.animate.__main__ import main, names
from ldm.cli.errors import run_guarded


def test_animate_help_needs_no_torch():
    code = "import sys, runpy; sys.argv = ['animate', '--help']\n"
    code += "try: runpy.run_module('ldm.animate', run_name='__main__')\n"
    code += "except SystemExit: assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in (
        "forward",
        "schedules",
        "reverse",
        "brownian",
        "density",
        "interpolate",
        "guidance",
        "attention",
        "loss",
    ):
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", sorted(names()))
def test_animate_help_documents_every_key(name, capsys):
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert "out=..." in said
    for option, one in names()[name].options.items():
        assert f"  {option}=" in said
        assert one.about, f"{name}.{option} has no comment"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["brownain"], "NAME=brownain: no such animation; did you mean 'brownian'?"),
        (["density", "stpes=3"], "stpes=3: no key 'stpes'; did you mean 'steps'?"),
        (["density", "steps=many"], "steps=many: expected a whole number"),
        (["reverse"], "run=... must be given"),
        (["density", "out=a.jpg"], "out=a.jpg: expected a name that ends in"),
        (["reverse", "run=nowhere"], "run=nowhere: no such folder"),
    ],
)
def test_animate_reports_error_in_one_line(words, said, capsys):
    assert run_guarded(lambda: main(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_animate_prints_output_path(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["brownian", "num=3", "frames=2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("brownian.gif: 3 frames, ")
    assert main(["brownian", "num=3", "frames=2", "out=some/b.png"]) == 0
    assert Image.open("some/b.png").size == (2 * 644 + 4, 3 * 254 + 4)
    assert [file.name for file in (tmp_path / "some").iterdir()] == ["b.png"]
