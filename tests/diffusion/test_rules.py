"""The rules of ldm/diffusion: its imports, the length and parameters of a sampler, and that every option is built."""

import ast
import inspect
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm.config.compose import compose_option
from ldm.config.overrides import ConfigSearchPath
from ldm.diffusion import sampler

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ldm/diffusion").glob("*.py"))
GROUPS = (
    "schedule",
    "prediction",
    "weighting",
    "timestep_sampling",
    "sampler",
    "guidance",
    "timestep_spacing",
    "objective",
)
OPTIONS = [(group, o) for group in GROUPS for o in ConfigSearchPath((ROOT / "conf",), ROOT).groups()[group]]
STANDARD = {"math", "collections", "contextlib", "dataclasses", "functools", "itertools", "typing"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_diffusion_imports_only_torch_and_base_modules(file):
    for node in ast.walk(ast.parse(file.read_text())):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            ok = name.split(".")[0] in STANDARD | {"torch"} or name.startswith(
                ("ldm.diffusion.", "ldm.tensors", "ldm.condition", "ldm.errors")
            )
            assert ok, f"{file.name} imports {name}"


def samplers():
    return [
        f
        for _, f in inspect.getmembers(sampler, inspect.isfunction)
        if list(inspect.signature(f).parameters)[:5] == ["denoise", "schedule", "x", "ts", "noise"]
    ]


@pytest.mark.parametrize("f", samplers(), ids=lambda f: f.__name__)
def test_samplers_have_at_most_45_lines(f):
    assert len(inspect.getsource(f).splitlines()) <= 45
    assert not {"mask", "cfg", "cond", "x0", "model"} & set(inspect.signature(f).parameters)


def test_samplers_are_collected():
    assert len(samplers()) >= 9


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_diffusion_public_functions_have_docstrings(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and node in ast.parse(file.read_text()).body
        ):
            assert ast.get_docstring(node), node.name
    assert len(file.read_text().splitlines()) < 350


OTHERS = {"schedule": "linear", "prediction": "v", "weighting": "output", "timestep_sampling": "discrete"}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_diffusion_option_is_built(group, option):
    config = OmegaConf.create({name: compose_option(name, other) for name, other in OTHERS.items()})
    config[group] = compose_option(group, option)
    node = config[group]
    if "encoder" in node:  # whose weights are an asset, and not needed to see that the option fits
        node.encoder = {"_target_": "torch.nn.Identity"}
    if "teacher" in node:  # a run that has to exist
        node.teacher = {"_target_": "torch.nn.Identity"}
    assert instantiate(node) is not None


@pytest.mark.parametrize("path", sorted((ROOT / "conf/process").glob("*.yaml")), ids=lambda p: p.stem)
def test_process_options_name_existing_options(path):
    config = OmegaConf.load(path)
    assert path.read_text().startswith("# @package _global_\n")
    chosen = {k.removeprefix("override /"): v for d in config.defaults for k, v in d.items()}
    assert {"schedule", "prediction", "weighting", "timestep_sampling"} <= set(chosen)
    for group, option in chosen.items():
        assert (ROOT / f"conf/{group}/{option}.yaml").exists(), (group, option)
