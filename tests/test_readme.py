"""Every command in a fenced `sh` block of a README is run, every link leads somewhere, every Python block runs."""

import json
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line_error
from smoke import ROOT, command, first_job, here, plan_of
from test_experiments import NEEDS, ON_TOP, TINY, some_images, some_molecules

from ldm.cli.errors import run_guarded
from ldm.config import compose
from ldm.io import images
from ldm.metrics import features
from ldm.report import __main__ as report
from ldm.report import frontier

README = ROOT / "README.md"
READMES = [README, *(ROOT / "ldm").rglob("README.md"), *(ROOT / "experiments").rglob("README.md")]
READMES += [*(ROOT / "conf").glob("README.md"), ROOT / "tests" / "README.md"]
SMALL = ("budget=smoke", "training.sample_every=500", "trainer.devices=1")  # no grid: not every stage draws one
KNOWN = {"python", "pip", "pytest", "cd", "git", "uv", "torchrun", "ln", ".ci/run"}
KNOWN |= {"cp", "perl", "export"}  # of experiments/paper_template
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
    """The words of every command in the shell blocks: no comments, `&&` joins two, a backslash joins two lines."""
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


def is_experiment(file: Path) -> bool:
    """Whether a README belongs to one study: its commands take minutes even when they are small."""
    return file.is_relative_to(ROOT / "experiments") and file.parent != ROOT / "experiments"


TEXT = README.read_text()
ALL = {file: commands(file.read_text(encoding="utf-8")) for file in READMES}
TYPED = [list(words) for words in dict.fromkeys(tuple(words) for typed in ALL.values() for words in typed)]
STUDY = {tuple(words) for file, typed in ALL.items() if is_experiment(file) for words in typed}
STUDY -= {tuple(words) for file, typed in ALL.items() if not is_experiment(file) for words in typed}


def typed_after(*first: str, study: bool = False) -> list[list[str]]:
    """What follows the words `first` in the commands of the studies' READMEs, or of all others."""
    chosen = [words for words in TYPED if (tuple(words) in STUDY) == study and words[: len(first)] == [*first]]
    return [words[len(first) :] for words in chosen]


TRAIN = [words for words in typed_after("python", "train.py") if "--config-dir" not in words]
OWN = [words for words in typed_after("python", "train.py") if "--config-dir" in words]
STUDIES = [words for words in typed_after("python", "train.py", study=True) if "--config-dir" not in words]
CHANGED_STUDIES = [
    words
    for words in STUDIES
    if {*words} - {"-m", "init=RUN"} - {word for word in words if word.startswith("experiment=")}
    and "CLIP/" not in " ".join(words)
]
LOOK = [words for words in typed_after("python", "-m") if words[0] in ("ldm.animate", "ldm.report.browse")]
SAMPLE = typed_after("python", "sample.py")
PLANS = typed_after("python", "-m", "ldm.plan") + typed_after("python", "-m", "ldm.plan", study=True)
REPORTS = typed_after("python", "-m", "ldm.report") + typed_after("python", "-m", "ldm.report", study=True)
REPORTS = [words for words in REPORTS if not words[0].startswith("../")]  # tests/test_paper_template.py
FRONTIERS = [words for words in TYPED if "ldm.report.frontier" in words]
SCRIPTS = [words[1:] for words in TYPED if words[0] == "python" and words[1].startswith("experiments/")]
TOOLS = {"ldm.animate", "ldm.report.browse", "ldm.plan", "ldm.report", "ldm.report.frontier", "ldm.cli.export"}
TOOLS |= {"ldm.evaluation.adm", "ldm.app"}  # ldm.app: tests/app/test_app.py


def test_readme_commands_are_parsed():
    assert commands(EXAMPLE) == [
        ["pip", "install", "-e", ".[dev]"],
        ["python", "train.py"],
        ["python", "sample.py", "run=runs/some", "prompt=it's a=b", "num=16"],
    ]
    assert [b.language for b in blocks(EXAMPLE)] == ["sh", "python", ""]


def test_readme_contains_train_and_test_commands():
    assert {("python", "train.py"), ("pytest",), ("pip", "install", "-e", ".[dev]")} <= {*map(tuple, ALL[README])}


def test_readme_is_short():
    assert len(TEXT.splitlines()) < 200


@pytest.mark.parametrize("words", TYPED, ids=" ".join)
def test_readme_command_is_run_by_a_test(words):
    words = [word for word in words if not re.match(r"[A-Z]+=", word)]
    assert words[0] in KNOWN
    if words[:2] == ["python", "-m"]:
        assert words[2] in TOOLS
    elif words[0] == "python":
        assert words[1] in ("train.py", "sample.py") or words[1].startswith(("experiments/", "tests/"))
    for word in words[1:]:
        if word.endswith(".py"):
            assert (ROOT / word).is_file()
        if match := re.fullmatch(r"(?:run=)?(experiments/.*)", word):
            assert (ROOT / match[1]).exists()


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
def test_readme_train_command_runs(typed, smoke, tmp_path, capfd):
    typed = [f"init={smoke.run}" if word == "init=RUN" else word for word in typed]
    if {"--help", "--cfg"} & set(typed):
        assert command("train.py", *typed) == 0
        assert "schedule" in capfd.readouterr().out
        return
    study = next((word.partition("=")[2] for word in typed if word.startswith("experiment=")), None)
    if study in NEEDS:
        some_images(tmp_path / "images")
        typed = [word for word in typed if not word.startswith("data.path=")] + [*NEEDS[study]]
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("train.py", *of_training(typed)) == 0


def study_of(typed: list[str]) -> str:
    """The study that a command names by experiment=, or nothing."""
    return next((word.partition("=")[2] for word in typed if word.startswith("experiment=")), "")


@pytest.mark.parametrize("typed", STUDIES, ids=" ".join)
def test_readme_study_command_composes(typed):
    typed = [re.sub(r"=(RUN|CLIP/.*)$", "=.", word) for word in typed]
    plan_of(*typed).check()


@pytest.mark.slow
@pytest.mark.parametrize("typed", CHANGED_STUDIES, ids=" ".join)
def test_readme_study_command_runs_its_first_job(typed, smoke, tmp_path):
    """A study as its file has it is run by test_experiments.py."""
    study = study_of(typed)
    base = (f"init={smoke.run}",) if study in ON_TOP else ()
    typed = [word for word in typed if word != "init=RUN"]
    some_molecules(tmp_path / "molecules.smi")
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        small = first_job(*typed, "budget=smoke", *TINY, *NEEDS.get(study, ()), *base)
        assert command("train.py", *small) == 0


@pytest.mark.parametrize("typed", OWN, ids=" ".join)
def test_readme_user_code_command_runs(typed, smoke, tmp_path, monkeypatch):
    """The blocks that begin with a file's name are those files."""
    for block in [block for file in READMES for block in blocks(file.read_text(encoding="utf-8"))]:
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


CONDITIONS = {  # what a model of captions has not: models that have it are in conditioner/test_conditioner_commands.py
    **{"task=image_variations": "image", "task=layout": "boxes", "task=semantic": "map", "task=instruct": "source"},
    "task=super_resolution": "low_res",
}


@pytest.mark.parametrize("typed", SAMPLE, ids=" ".join)
def test_readme_sample_command_runs(typed, smoke, prompted, tmp_path, capfd):
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        some_files(prompted, typed)
        own = [
            f"run={prompted}" if word.startswith("run=") else word
            for word in typed
            if not word.startswith("trainer.devices=")
        ]
        words = ("sample.py", *own, "num=20", "steps=2", "output_dir=drawn")
        if missing := next((CONDITIONS[word] for word in own if word in CONDITIONS), None):
            assert_one_line_error(capfd, f"{missing}: this model has no such condition", *words)
        else:
            assert command(*words) == 0
            assert (tmp_path / "drawn" / "metrics.json").is_file()


@pytest.mark.parametrize("typed", LOOK, ids=" ".join)
def test_readme_tool_command_runs(typed, smoke, prompted, tmp_path):
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
            if word.startswith("out="):
                assert (tmp_path / word.removeprefix("out=")).stat().st_size > 1000


@pytest.mark.parametrize("block", [b for b in blocks(TEXT) if b.language == "python"], ids=lambda b: f"line {b.line}")
def test_readme_python_block_runs(block, prompted):
    code = re.sub(r"""load_model\(["'][^"']*["']""", f"load_model({str(prompted)!r}", block.text)
    assert code != block.text or "load_model" not in block.text
    names: dict = {}
    exec(compile(code, f"README.md:{block.line}", "exec"), names)
    for line in block.text.splitlines():  # shapes in the margin are true
        if match := re.match(r"(\w+) = .*#.*?\((\d+(?:, \d+)+)\)", line):
            assert tuple(names[match[1]].shape) == tuple(map(int, match[2].split(", "))), line


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("file", [*READMES, ROOT / "experiments" / "LOG.md"], ids=lambda f: str(f.relative_to(ROOT)))
def test_readme_links_exist(file):
    text = file.read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#?([^)\s]*)\)", text):
        target = file.parent / path if path else file
        assert target.exists(), f"{file}: {path}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{file}: {path}#{anchor}"


def test_readme_test_command_is_that_of_ci():
    script = (ROOT / ".ci" / "run").read_text()
    line = next(line for b in blocks(TEXT) if b.language == "sh" for line in b.text.splitlines() if "&& pytest" in line)
    assert line.split("#")[0].strip() in re.sub(
        r"pip install -\S+ -e", "pip install -e", script
    )  # quieter, but the same
    assert "\npytest -m slow" in script


@pytest.mark.slow
@pytest.mark.parametrize("typed", PLANS, ids=" ".join)
def test_readme_plan_command_runs(typed, tmp_path, capsys):
    with here(tmp_path):
        assert run_guarded(lambda: import_module("ldm.plan.__main__").main(list(typed))) == 0
    assert "device-hours" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*biased")
@pytest.mark.parametrize("typed", REPORTS, ids=" ".join)
def test_readme_report_command_runs(typed, smoke, tmp_path, monkeypatch):
    """Studies are copies, so that the repository's tables stay as they are; runs are the shared one."""
    for name in ("conf", "ldm", "experiments"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("A", "B"):
        shutil.copytree(smoke.run, tmp_path / "runs" / name)
    monkeypatch.setattr(compose, "ROOT", tmp_path)
    monkeypatch.setattr(report, "STUDIES", tmp_path / "experiments")
    small = {"levels": ("num=8", "bins=2"), "bits": ("num=2", "steps=4")}.get(typed[0], ())
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert run_guarded(lambda: report.main([*typed, *small])) == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*biased")
@pytest.mark.parametrize("typed", FRONTIERS, ids=" ".join)
def test_readme_frontier_command_samples_its_first_point(typed, smoke, tmp_path, monkeypatch):
    every = frontier.sampling_points
    monkeypatch.setattr(frontier, "sampling_points", lambda *a: (every(*a)[0][:1], every(*a)[1]))
    monkeypatch.setenv("CLASSIFIER", "a run")
    words = [f"run={smoke.run}" if word.startswith("run=") else word for word in typed[typed.index("-m") + 2 :]]
    words = [str(ROOT / word) if word.startswith("experiments/") else word for word in words]
    small = ["num=6", "batch_size=6", "metrics=fd", "out=points.csv"]
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert run_guarded(lambda: frontier.main([*words, *small])) == 0
        assert (tmp_path / "points.csv").is_file()


@pytest.mark.parametrize("typed", typed_after("python", "-m", "ldm.cli.export"), ids=" ".join)
def test_readme_export_command_runs(typed, smoke, tmp_path):
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        (tmp_path / "runs").symlink_to(smoke.folder / "runs")
        assert import_module("ldm.cli.export").main(list(typed)) == 0
        assert all(Path(word[4:]).exists() for word in typed if word.startswith("out="))


@pytest.mark.parametrize("typed", typed_after("python", "-m", "ldm.evaluation.adm"), ids=" ".join)
def test_readme_adm_command_runs(typed, tmp_path, monkeypatch):
    """With small images and a toy network in place of Inception."""
    from test_adm import Toy, pictures

    monkeypatch.setattr(features, "SpatialInception", Toy)
    for i, word in enumerate(typed):
        np.savez(tmp_path / word, arr_0=pictures(20, i))
    with here(tmp_path):
        assert run_guarded(lambda: import_module("ldm.evaluation.adm").main(list(typed))) == 0


@pytest.mark.slow
@pytest.mark.parametrize("typed", SCRIPTS, ids=" ".join)
def test_readme_script_starts_with_its_arguments(typed, tmp_path, monkeypatch):
    """Scripts that take hours, or runs of another study: they import and their main accepts what is typed."""
    file = ROOT / typed[0]
    monkeypatch.syspath_prepend(str(file.parent))
    names = {path.stem for path in file.parent.glob("*.py")} - {*sys.modules}  # what another test imported stays
    with here(tmp_path):
        try:
            main = runpy.run_path(str(file), run_name="script")["main"]
        finally:
            for name in names & {*sys.modules}:
                del sys.modules[name]
    parameters = signature(main).parameters.values()
    if [p.annotation for p in parameters] != [list[str]]:  # one that takes all the words
        signature(main).bind(*typed[1:])
