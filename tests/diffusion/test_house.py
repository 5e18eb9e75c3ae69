"""The rules of ldm/diffusion: what it imports, how long a sampler may be, what a sampler may be told, and that every option is one yaml."""

import ast
import inspect
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

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
OPTIONS = [p for g in GROUPS for p in sorted((ROOT / "conf" / g).glob("*.yaml"))]
STANDARD = {"math", "collections", "dataclasses", "functools", "itertools", "typing"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_imports_torch_and_floor_0_alone(file):
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
                ("ldm.diffusion.", "ldm.tensors", "ldm.condition")
            )
            assert ok, f"{file.name} imports {name}"


def samplers():
    return [
        f
        for _, f in inspect.getmembers(sampler, inspect.isfunction)
        if list(inspect.signature(f).parameters)[:5] == ["denoise", "schedule", "x", "ts", "noise"]
    ]


@pytest.mark.parametrize("f", samplers(), ids=lambda f: f.__name__)
def test_no_sampler_is_over_45_lines(f):
    assert len(inspect.getsource(f).splitlines()) <= 45
    assert not {"mask", "cfg", "cond", "x0", "model"} & set(inspect.signature(f).parameters)


def test_every_sampler_is_found():
    assert len(samplers()) >= 9


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_public_function_says_what_it_is(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef)
            and not node.name.startswith("_")
            and node in ast.parse(file.read_text()).body
        ):
            assert ast.get_docstring(node), node.name
    assert len(file.read_text().splitlines()) < 350


def load(path):
    """The option alone, what it interpolates from other groups included."""
    loaded = OmegaConf.load(path)
    config = OmegaConf.create(
        {path.parent.name: loaded} if "_target_" in loaded else loaded
    )  # one that sets other keys names its own too
    for group, option in [
        ("schedule", "linear"),
        ("prediction", "v"),
        ("weighting", "output"),
        ("timestep_sampling", "discrete"),
    ]:
        if group not in config:
            config[group] = OmegaConf.load(ROOT / f"conf/{group}/{option}.yaml")
    return config[path.parent.name]


@pytest.mark.parametrize("path", OPTIONS, ids=lambda p: f"{p.parent.name}={p.stem}")
def test_every_option_is_built_with_every_default_written_out(path):
    config = load(path)
    check(config)
    if "encoder" in config:  # whose weights are an asset, and not needed to see that the option fits
        config.encoder = {"_target_": "torch.nn.Identity"}
    if "teacher" in config:  # a run that has to be there
        config.teacher = {"_target_": "torch.nn.Identity"}
    assert instantiate(config) is not None


def check(node, around=frozenset()):
    target = node["_target_"]
    module, name = target.rsplit(".", 1)
    f = getattr(__import__(module, fromlist=[name]), name)
    parameters = inspect.signature(f).parameters.values()
    given = {k for k in node if not k.startswith("_")}
    assert given <= {p.name for p in parameters}, target
    optional = {p.name for p in parameters if p.default is not inspect.Parameter.empty and p.name != "floor"}
    assert optional <= given | around, (
        f"{target} does not write out {optional - given}"
    )  # what the node around it passes on is there
    for child in node.values():
        if OmegaConf.is_dict(child) and "_target_" in child:
            check(child, given)


@pytest.mark.parametrize("path", sorted((ROOT / "conf/process").glob("*.yaml")), ids=lambda p: p.stem)
def test_processes_name_options_that_exist(path):
    config = OmegaConf.load(path)
    assert path.read_text().startswith("# @package _global_\n")
    chosen = {k.removeprefix("override /"): v for d in config.defaults for k, v in d.items()}
    assert {"schedule", "prediction", "weighting", "timestep_sampling"} <= set(chosen)
    for group, option in chosen.items():
        assert (ROOT / f"conf/{group}/{option}.yaml").exists(), (group, option)
