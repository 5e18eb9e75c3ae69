"""Everything in the README that can be typed is typed."""

import json
import re
import shlex
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from smoke import ROOT, command, first_job, here
from test_experiments import NEEDS, TINY, some_images

from ldm.io import images

README = ROOT / "README.md"
SMALL = ("budget=smoke", "training.sample_every=500", "trainer.devices=1")  # no grid: not every stage draws one
KNOWN = {"python", "pip", "pytest", "cd", "git", "uv", "torchrun", ".ci/run"}
EXAMPLE = """
# Title
```sh
pip install -e '.[dev]' && python train.py     # the main job
python sample.py run=runs/some prompt="it's a=b" \\
    num=16  # two lines
```
    python no.py
```python
print("x")
```
```
not a command
```
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the line where it begins."""

    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(m[1], m[2], text[: m.start()].count("\n") + 1)
        for m in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def commands(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks; a trailing comment is none, `&&` joins two, a backslash two lines."""
    found = []
    for block in blocks(text):
        if block.language in ("sh", "bash", "shell", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    found.append(words[: words.index("&&")])
                    words = words[words.index("&&") + 1 :]
                found.append(words)
    return [words for words in found if words]


TEXT = README.read_text()
TYPED = commands(TEXT)
TRAIN = [words[2:] for words in TYPED if words[:2] == ["python", "train.py"] and "--config-dir" not in words]
OWN = [words[2:] for words in TYPED if words[:2] == ["python", "train.py"] and "--config-dir" in words]
LOOK = [
    words[2:] for words in TYPED if words[:2] == ["python", "-m"] and words[2] in ("ldm.animate", "ldm.report.browse")
]
SAMPLE = [words[2:] for words in TYPED if words[:2] == ["python", "sample.py"]]


def test_commands_are_found():
    assert commands(EXAMPLE) == [
        ["pip", "install", "-e", ".[dev]"],
        ["python", "train.py"],
        ["python", "sample.py", "run=runs/some", "prompt=it's a=b", "num=16"],
    ]
    assert [b.language for b in blocks(EXAMPLE)] == ["sh", "python", ""]


def test_the_readme_has_the_two_commands():
    assert ["python", "train.py"] in TYPED
    assert ["pytest"] in TYPED
    assert ["pip", "install", "-e", ".[dev]"] in TYPED


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_command_is_one_we_know_and_its_file_is_there(words):
    assert words[0] in KNOWN
    for word in words[1:]:
        if word.endswith(".py"):
            assert (ROOT / word).is_file()
        if match := re.fullmatch(r"run=(experiments/.*)", word):
            assert (ROOT / match[1]).is_dir()


def of_training(typed: list[str]) -> tuple[str, ...]:
    """What a person typed, made small; the first job of a sweep."""
    judged = ("~training.score", "~training.sample_every")
    alone = {"training=autoencoder": judged[:1], "training=evaluator": judged, "training=classifier": judged}
    extra = tuple(x for choice, more in alone.items() if choice in typed for x in more)
    sizes = () if extra else TINY[:4] + TINY[6:]
    small = SMALL[:1] + SMALL[2:] if {"training=evaluator", "training=classifier"} & {*typed} else SMALL
    sized = [
        word
        for word in typed
        if not re.match(r"(training|first_stage|evaluator)\.(steps|batch_size)=|logger=|logger\.", word)
    ]
    return (
        *first_job(*[word for word in sized if not word.startswith(("-h", "--"))], *small, "logger=none"),
        *extra,
        *sizes,
        "metrics=none",
    )


@pytest.mark.parametrize("typed", TRAIN, ids=" ".join)
def test_train_command_runs(typed, smoke, tmp_path, capfd):
    if "--help" in typed:
        assert command("train.py", *typed) == 0
        assert "schedule" in capfd.readouterr().out
        return
    study = next((word.partition("=")[2] for word in typed if word.startswith("experiment=")), None)
    if study in NEEDS:
        some_images(tmp_path / "images")
        typed = [word for word in typed if not word.startswith("data.path=")] + [*NEEDS[study]]
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("train.py", *of_training(typed)) == 0


@pytest.mark.parametrize("typed", OWN, ids=" ".join)
def test_command_with_code_of_your_own_runs(typed, smoke, tmp_path, monkeypatch):
    """The blocks that begin with a file's name are those files."""
    for block in blocks(TEXT):
        if match := re.match(r"# (paper/\S+)\n", block.text):
            path = tmp_path / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    monkeypatch.syspath_prepend(tmp_path)
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("train.py", *typed, *SMALL) == 0
        (run,) = (tmp_path / "runs").iterdir()
        assert json.loads((run / "metrics.json").read_text())["n"] == 20  # trained, drawn and scored


def some_files(run: Path, typed: list[str]) -> None:
    """What a person has who types this: pictures, a mask, a map, boxes, an image drawn before."""
    for name, size in {"photo.png": 32, "small.png": 8, "map.png": 32}.items():
        images.save_png(Path(name), torch.randint(0, 2, (1, size, size), dtype=torch.uint8))
    images.save_png(Path("mask.png"), torch.arange(32).ge(16).byte().mul(255).expand(1, 32, 32))
    Path("boxes.json").write_text("[[0, 0, 0, 0.5, 1]]")
    if any(word.startswith("reproduce=") for word in typed):
        assert command("sample.py", f"run={run}", "prompt=a bag", "num=4", "steps=2", "output_dir=drawn") == 0


@pytest.mark.parametrize("typed", SAMPLE, ids=" ".join)
def test_sample_command_runs(typed, smoke, prompted, tmp_path):
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        some_files(prompted, typed)
        own = [
            f"run={prompted}" if word.startswith("run=") else word
            for word in typed
            if not word.startswith("trainer.devices=")
        ]
        assert command("sample.py", *own, "num=20", "steps=2", "output_dir=drawn") == 0
        assert (tmp_path / "drawn" / "metrics.json").is_file()


@pytest.mark.parametrize("typed", LOOK, ids=" ".join)
def test_command_to_look_runs(typed, smoke, prompted, tmp_path):
    """Pictures with as few frames as there can be."""
    tool, *words = typed
    small = {
        "density": ("steps=2", "num=5", "training=2"),
        "reverse": ("steps=2",),
        "guidance": ("steps=2", "num=2"),
    }.get(words[0], ())
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        (tmp_path / "runs").symlink_to(smoke.folder / "runs")
        own = [f"run={prompted}" if word.startswith("run=") else word for word in words]
        assert import_module(f"{tool}.__main__" if tool == "ldm.animate" else tool).main([*own, *small]) == 0
        for word in words:
            if word.startswith("output_dir="):
                assert (tmp_path / word.removeprefix("output_dir=")).stat().st_size > 1000


@pytest.mark.parametrize("block", [b for b in blocks(TEXT) if b.language == "python"], ids=lambda b: f"line {b.line}")
def test_python_block_runs(block, prompted):
    code = re.sub(r"""load\(["'][^"']*["']""", f"load({str(prompted)!r}", block.text)
    names: dict = {}
    exec(compile(code, f"README.md:{block.line}", "exec"), names)
    for line in block.text.splitlines():  # shapes in the margin are true
        if match := re.match(r"(\w+) = .*#.*?\((\d+(?:, \d+)+)\)", line):
            assert tuple(names[match[1]].shape) == tuple(map(int, match[2].split(", "))), line


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", TEXT))))
def test_link_leads_somewhere(link):
    assert (ROOT / link).exists()


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    line = next(line for b in blocks(TEXT) if b.language == "sh" for line in b.text.splitlines() if "&& pytest" in line)
    assert line.split("#")[0].strip() in re.sub(
        r"pip install -\S+ -e", "pip install -e", script
    )  # quieter, but the same
    assert "\npytest -m slow\n" in script
