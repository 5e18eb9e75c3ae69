"""The rules of the source tree: which package imports which, which library is used where, file lengths and names."""

import ast
import graphlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INIT_FILES = sorted((ROOT / "ldm").rglob("__init__.py"))
MODULES = sorted({*(ROOT / "ldm").rglob("*.py")} - {*INIT_FILES})
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]

# A package, or a module directly below ldm, imports only from lines below its own; "script" is train.py and sample.py.
ORDER = [
    "script",
    "report",
    "recipes",
    "evaluation plan app animate",
    "training sampling cli",
    "checkpoint",
    "runs",
    "config",
    "interfaces model autoencoder adapter metrics interop",
    "net conditioner data",
    "diffusion io launch media plotting",
    "tensors condition ema devices",
    "errors compat",
]
LAYER = {package: layer for layer, line in enumerate(ORDER) for package in line.split()}
BASE = {"tensors", "condition", "errors"}
IMPORTS_ONLY = {  # parts that serve any model: what they may import at most, less than the order allows
    "diffusion": BASE,
    "media": BASE | {"io", "plotting"},
    "net": BASE | {"io"},
    "data": BASE | {"io", "media"},  # what a sample is made of: a mel of a sound, tokens of a molecule
    "metrics": BASE | {"io", "media", "net"},
    **dict.fromkeys(("autoencoder", "conditioner", "adapter", "interop"), BASE | {"io", "net"}),
}
LIBRARIES = {  # besides the standard library and torch
    "script": {"hydra"},
    "report": {"filelock", "hydra", "rich", "wandb"},
    "recipes": {"filelock", "hydra", "omegaconf"},
    "evaluation": {"hydra", "numpy"},
    "plan": {"hydra", "omegaconf"},
    "app": {"PIL", "gradio", "omegaconf", "starlette"},
    "animate": {"PIL", "hydra", "imageio", "imageio_ffmpeg", "matplotlib", "omegaconf"},
    "training": {"PIL", "lightning", "numpy", "tensorboard", "trackio", "wandb"},
    "sampling": {"PIL", "hydra", "numpy"},
    "cli": {"hydra", "omegaconf"},
    "checkpoint": {"hydra"},
    "runs": {"filelock", "omegaconf", "yaml"},
    "config": {"hydra", "omegaconf", "yaml"},
    "metrics": {"hydra", "numpy", "timm", "torch_fidelity", "torchmetrics", "torchvision"},
    "interop": {"open_clip", "safetensors"},
    "net": {"einops", "timm", "torchmetrics", "torchvision"},
    "conditioner": {"filelock", "huggingface_hub", "open_clip", "safetensors", "tokenizers", "transformers"},
    "data": {"PIL", "av", "datasets", "filelock", "numpy", "pyarrow", "torchvision"},
    "io": {"PIL", "filelock", "numpy", "safetensors", "torchvision", "yaml"},
    "launch": {"filelock"},
    "media": {"PIL", "av", "numpy"},
    "plotting": {"matplotlib"},
    "ema": {"numpy"},
    "compat": {"hydra", "trackio"},
}
SLOW_TO_IMPORT = {  # seconds each: imported inside the function that uses them
    *("open_clip", "timm", "torch_fidelity", "torchmetrics", "torchvision", "transformers", "tokenizers"),
    *("wandb", "gradio", "trackio"),
}
MAX_LINES = 350  # of a file
LONGER_FILES: dict[str, str] = {}  # path below the root: why it is longer

BANNED = {  # as a whole name: none of them says what the thing is or does
    *(
        "told",
        "untold",
        "heard",
        "said",
        "seen",
        "held",
        "kept",
        "worn",
        "mine",
        "own",
        "here",
        "there",
        "how",
        "whole",
    ),
    *("place", "found", "given", "wanted", "asked", "made", "fresh", "settled", "begun", "opened", "fitted", "drawn"),
    *("around", "beside", "anew", "again", "at", "one", "good", "deaf", "twin"),
}
BANNED_PARTS = {  # also as a part of a name; the others are ordinary there: loss_at, AssetNotFoundError
    *("told", "untold", "heard", "said", "held", "kept", "worn", "mine", "wanted", "asked", "settled", "begun", "anew"),
    *("deaf", "twin"),
}
STATE_DICT_ATTRIBUTES = {  # hold parameters or buffers: their names are part of the file format
    ("ldm/adapter/textual_inversion.py", "told"),
    ("ldm/conditioner/hint.py", "told"),
}


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def package_of(path: str) -> str:
    """Return the first part below ldm of a path below the root: net of ldm/net/unet.py, model of ldm/model.py."""
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == "ldm" else "script"


def imported_names(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Yield every import in a module, also inside functions and under TYPE_CHECKING, as (statement, dotted name).

    `from a.b import c` gives a.b.c: a module, or a name inside the module a.b.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def may_import(package: str, other: str) -> bool:
    if package == other:
        return True
    if package in IMPORTS_ONLY:
        return other in IMPORTS_ONLY[package]
    return LAYER[other] > LAYER[package]


def import_violations(path: str, source: str) -> list[str]:
    """Return one sentence for each import in a module that breaks a rule. path: below the root, ldm/net/unet.py."""
    package = package_of(path)
    if package not in LAYER:
        return [f"{path}: package {package} is not in ORDER"]
    allowed = {"torch", *LIBRARIES.get(package, ())}
    tree = ast.parse(source)
    violations = [
        f"{path}:{node.lineno} imports relatively"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    for node, name in imported_names(tree):
        top, *rest = name.split(".")
        if top == "ldm":
            other = rest[0] if rest else ""
            if other not in LAYER or not may_import(package, other):
                violations.append(f"{path}:{node.lineno} {package} imports ldm.{other}")
        elif top not in sys.stdlib_module_names and top not in allowed:
            violations.append(f"{path}:{node.lineno} {package} imports {top}")
        if top in SLOW_TO_IMPORT and node in tree.body:
            violations.append(f"{path}:{node.lineno} imports {top} at its top; import it where it is used")
    return list(dict.fromkeys(violations))  # one a statement, also when it imports many names


def module_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return for each module the modules it imports. sources: dotted module name -> source."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        names = {name for _, name in imported_names(ast.parse(source))}
        graph[module] = {n if n in sources else n.rpartition(".")[0] for n in names} & sources.keys() - {module}
    return graph


def import_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the members of one cycle, the first repeated at the end, or an empty list."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def sources() -> dict[str, str]:
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file.read_text() for file in MODULES}


def assigned(statement: ast.stmt) -> Iterator[ast.expr]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    for target in targets:
        yield from (node for node in ast.walk(target) if isinstance(getattr(node, "ctx", None), ast.Store))


def definitions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of functions, classes, methods, properties, constants, fields and attributes set on self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        if isinstance(node, ast.Module | ast.ClassDef):
            for statement in node.body:
                yield from ((t.lineno, t.id) for t in assigned(statement) if isinstance(t, ast.Name))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            attributes = [t for t in assigned(node) if isinstance(t, ast.Attribute)]
            yield from (
                (t.lineno, t.attr) for t in attributes if isinstance(t.value, ast.Name) and t.value.id == "self"
            )


def is_banned(name: str) -> bool:
    """Whether a name is a banned word, or has one of the idiolect among its parts; held_out is a term."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    return snake in BANNED or bool(BANNED_PARTS & set(snake.replace("held_out", "").split("_")))


def banned_definitions(path: str, source: str) -> list[str]:
    names = sorted(set(definitions(ast.parse(source))))
    return [f"{path}:{n} {name}" for n, name in names if is_banned(name) and (path, name) not in STATE_DICT_ATTRIBUTES]


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=relative)
def test_module_imports_only_what_its_package_may(file):
    assert not import_violations(relative(file), file.read_text())


def test_modules_have_no_import_cycle():
    assert not import_cycle(module_graph(sources()))


def test_packages_have_no_import_cycle():
    graph: dict[str, set[str]] = {}
    for module, others in module_graph(sources()).items():
        package = module.split(".")[1]
        graph.setdefault(package, set()).update({other.split(".")[1] for other in others} - {package})
    assert not import_cycle(graph)


def test_order_lists_every_package_once():
    packages = {package_of(relative(file)) for file in MODULES}
    listed = " ".join(ORDER).split()
    assert len(listed) == len(set(listed))
    assert packages <= set(listed)


@pytest.mark.parametrize("file", INIT_FILES, ids=relative)
def test_init_file_is_empty(file):
    """So that a name has one import path."""
    assert not file.read_text().strip()


def test_every_folder_of_modules_is_a_package():
    assert {file.parent for file in MODULES} <= {file.parent for file in INIT_FILES}


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=relative)
def test_file_is_short(file):
    assert len(file.read_text().splitlines()) <= MAX_LINES or relative(file) in LONGER_FILES


def test_longer_files_are_listed_only_while_they_are_longer():
    for path, reason in LONGER_FILES.items():
        assert reason
        assert len((ROOT / path).read_text().splitlines()) > MAX_LINES


@pytest.mark.parametrize("file", [*MODULES, *SCRIPTS], ids=relative)
def test_no_definition_has_a_banned_name(file):
    assert not banned_definitions(relative(file), file.read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ldm/diffusion/sampler.py", "import numpy"),
        ("ldm/diffusion/sampler.py", "from ldm.net.unet import UNet"),
        ("ldm/diffusion/sampler.py", "from ldm.io.atomic import write_json, write_text"),
        ("ldm/diffusion/sampler.py", "from ldm.ema import PowerEMA"),
        ("ldm/net/unet.py", "def f():\n    from ldm.diffusion.schedule import cosine"),
        (
            "ldm/net/unet.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ldm.model import LatentDiffusion",
        ),
        ("ldm/net/unet.py", "from ldm import model"),
        ("ldm/data/memory.py", "import ldm.metrics.distribution"),
        ("ldm/metrics/paired.py", "import lightning as L"),
        ("ldm/autoencoder/kl.py", "from ldm.conditioner.text import TextConditioner"),
        ("ldm/autoencoder/kl.py", "from ldm.diffusion.variance import fixed_small"),
        ("ldm/conditioner/text.py", "from ldm.autoencoder.kl import AutoencoderKL"),
        ("ldm/model.py", "from ldm.sampling.tasks import txt2img"),
        ("ldm/config/build.py", "def f():\n    from ldm.checkpoint.load import load_model"),
        ("ldm/sampling/tasks.py", "from ldm.training.fit import fit"),
        ("ldm/sampling/tasks.py", "import lightning"),
        ("ldm/training/fit.py", "from ldm.runs import cache\nfrom ldm.recipes import run"),
        ("ldm/training/fit.py", "from omegaconf import OmegaConf"),
        ("ldm/recipes/diffusion.py", "import lightning"),
        ("ldm/recipes/diffusion.py", "from ldm.report.html import page"),
        ("ldm/evaluation/evaluate.py", "from ldm.plan import flops"),
        ("ldm/tensors.py", "import einops"),
        ("ldm/errors.py", "from ldm.ema import PowerEMA"),
        ("ldm/training/loggers.py", "import wandb"),
        ("ldm/metrics/paired.py", "from torchmetrics.image import PeakSignalNoiseRatio"),
        ("ldm/net/unet.py", "from .blocks import norm"),
        ("ldm/net/unet.py", "from ldm.nonexistent import norm"),
        ("ldm/utils/misc.py", "import math"),
        ("train.py", "import lightning"),
    ],
)
def test_import_violations_finds_a_violation(path, source):
    assert len(import_violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ldm/diffusion/sampler.py", "import math\nimport torch.nn.functional as F\nfrom ldm.tensors import expand"),
        ("ldm/diffusion/times.py", "from ldm.errors import ConfigError"),
        ("ldm/autoencoder/conv.py", "from ldm.net.blocks import norm"),
        ("ldm/training/fit.py", "import lightning as L\nfrom ldm.model import LatentDiffusion"),
        (
            "ldm/recipes/run.py",
            "from hydra.utils import instantiate\nfrom ldm.io import atomic\nfrom ldm.runs import folder",
        ),
        ("ldm/training/loggers.py", "def start():\n    import wandb"),
        ("ldm/ema.py", "from ldm.errors import ConfigError"),
        ("sample.py", "from ldm.report import html"),
    ],
)
def test_import_violations_allows_what_the_rules_allow(path, source):
    assert not import_violations(path, source)


@pytest.mark.parametrize(
    "inside",
    ["from ldm.a import x", "from ldm import a", "import ldm.a", "def f():\n    from ldm.a import x"],
)
def test_import_cycle_finds_a_cycle(inside):
    graph = module_graph({"ldm.a": "from ldm.b.c import y", "ldm.b.c": inside, "ldm.d": "import ldm.a"})
    assert set(import_cycle(graph)) == {"ldm.a", "ldm.b.c"}


def test_import_cycle_passes_a_chain():
    assert not import_cycle(
        module_graph({"ldm.a": "from ldm import b", "ldm.b": "import ldm.d", "ldm.d": "import ldm"})
    )


@pytest.mark.parametrize(
    "source",
    [
        "def told(): ...",
        "def _settled(): ...",
        "async def wanted(): ...",
        "class Kept: ...",
        "class ToldScale: ...",
        "OWN = 1",
        "FOUND: int = 1",
        "class A:\n    place: int",
        "class A:\n    held = 1",
        "class A:\n    @property\n    def whole(self): ...",
        "class A:\n    def f(self):\n        self.x, self.seen = 1, 2",
        "def f():\n    def one(): ...",
        "def worn_layers(): ...",
    ],
)
def test_banned_definitions_finds_a_name(source):
    assert len(banned_definitions("ldm/model.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def load_model(told): ...",
        "held_out = 1",
        "def load_held_out(): ...",
        "def loss_at(t): ...",
        "class OverfitOneBatch: ...",
        "class AssetNotFoundError(Exception): ...",
        "def f():\n    one = 1",
    ],
)
def test_banned_definitions_allows_terms(source):
    assert not banned_definitions("ldm/model.py", source)


def test_banned_definitions_excepts_state_dict_attributes():
    source = "class A:\n    def f(self):\n        self.told = 1"
    assert not banned_definitions("ldm/conditioner/hint.py", source)
    assert banned_definitions("ldm/conditioner/text.py", source)
