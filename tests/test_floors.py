"""The floors of the house: who may import whom, and which library is allowed where."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "ldm").rglob("*.py"))

FLOOR = {
    **dict.fromkeys(("tensors", "condition", "errors", "fetch", "pretrained", "durable", "progress", "parse"), 0),
    **dict.fromkeys(("diffusion", "net", "data", "metrics", "ema"), 1),
    **dict.fromkeys(("autoencoder", "conditioner", "objective", "adapter", "interop"), 2),
    "model": 3,
    "task": 4,
    **dict.fromkeys(("training", "score"), 5),
}
ROOF = 6  # every room not named above
LIBRARIES = {  # besides the standard library and torch
    "fetch": {"filelock", "torchvision"},
    "durable": {"safetensors"},
    "parse": {"yaml"},
    "net": {"einops"},
    "data": {"PIL", "filelock", "numpy", "torchvision", "datasets"},
    "metrics": {"numpy", "timm", "torchmetrics", "torch_fidelity", "torchvision"},
    "ema": {"numpy"},
    "pretrained": {"timm", "torchmetrics", "torchvision"},
    "conditioner": {"huggingface_hub", "open_clip", "safetensors", "tokenizers", "transformers"},
    "interop": {"open_clip", "safetensors"},
    "training": {"lightning"},
    "animate": {"imageio", "imageio_ffmpeg", "matplotlib"},
    "app": {"starlette"},
}
ON_THE_ROOF = {"PIL", "einops", "filelock", "gradio", "hydra", "omegaconf", "numpy", "rich", "wandb", "yaml"}
HEAVY = {
    "open_clip",
    "timm",
    "torch_fidelity",
    "torchmetrics",
    "torchvision",
    "transformers",
    "tokenizers",
    "wandb",
    "gradio",
}


def floor(room: str) -> int:
    return FLOOR.get(room, ROOF)


def may_use(room: str, other: str) -> bool:
    """Whether a module of `room` may import from `other`, both first parts below ldm."""
    if room == other:
        return True
    if room == "diffusion":
        return other in ("tensors", "condition", "errors")
    if floor(room) == 2:
        return floor(other) == 0 or other == "net"
    return floor(other) < floor(room) or (floor(other) == floor(room) and floor(room) in (0, 5, ROOF))


def faults(path: str, source: str) -> list[str]:
    """What is wrong with a module's imports. path: below the root, ldm/net/unet.py."""
    parts = Path(path).with_suffix("").parts
    room = parts[1] if parts[0] == "ldm" else "script"
    allowed = {"torch", *LIBRARIES.get(room, ())} | (ON_THE_ROOF if floor(room) == ROOF else set())
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"{path}:{node.lineno} imports relatively")
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"ldm.{a.name}" for a in node.names] if node.module == "ldm" else [node.module]
        for name in names:
            top = name.split(".")[0]
            if top == "ldm":
                other = name.split(".")[1] if "." in name else ""
                if not may_use(room, other):
                    found.append(
                        f"{path}:{node.lineno} {room} (floor {floor(room)}) imports ldm.{other} (floor {floor(other)})"
                    )
            elif top not in sys.stdlib_module_names and top not in allowed:
                found.append(f"{path}:{node.lineno} {room} imports {top}")
            if top in HEAVY and node in tree.body:
                found.append(f"{path}:{node.lineno} imports {top} at its top; import it where it is used")
    return found


@pytest.mark.parametrize("file", MODULES, ids=lambda f: f.relative_to(ROOT / "ldm").as_posix())
def test_module_keeps_to_its_floor(file):
    assert not faults(file.relative_to(ROOT).as_posix(), file.read_text())


@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_scripts_are_roof(name):
    assert not faults(name, (ROOT / name).read_text())


@pytest.mark.parametrize("file", [f for f in MODULES if f.name == "__init__.py"], ids=lambda f: f.parent.name)
def test_a_name_has_one_import_path(file):
    assert not file.read_text().strip()


def test_every_package_is_one():
    assert {f.parent for f in MODULES} == {f.parent for f in MODULES if f.name == "__init__.py"}


@pytest.mark.parametrize(
    "file", [*MODULES, ROOT / "train.py", ROOT / "sample.py"], ids=lambda f: f.relative_to(ROOT).as_posix()
)
def test_a_file_can_be_held_in_the_head(file):
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ldm/diffusion/sampler.py", "import numpy"),
        ("ldm/diffusion/sampler.py", "from ldm.net.unet import UNet"),
        ("ldm/diffusion/sampler.py", "from ldm.io.atomic import write_json"),
        ("ldm/net/unet.py", "def f():\n    from ldm.diffusion.schedule import cosine"),
        ("ldm/net/unet.py", "from ldm import model"),
        ("ldm/data/memory.py", "import ldm.metrics.judge"),
        ("ldm/metrics/judge.py", "import lightning as L"),
        ("ldm/autoencoder/kl.py", "from ldm.conditioner.text import Text"),
        ("ldm/autoencoder/kl.py", "from ldm.diffusion.variance import small"),
        ("ldm/conditioner/text.py", "from ldm.autoencoder.kl import AutoencoderKL"),
        ("ldm/model.py", "from ldm.sampling.tasks import draw"),
        ("ldm/sampling/tasks.py", "from hydra.utils import instantiate"),
        ("ldm/training/fit.py", "from ldm.stage import cache"),
        ("ldm/training/fit.py", "from omegaconf import OmegaConf"),
        ("ldm/recipes/diffusion.py", "import lightning"),
        ("ldm/tensors.py", "import einops"),
        ("ldm/errors.py", "from ldm.ema import PowerEMA"),
        ("ldm/training/loggers.py", "import wandb"),
        ("ldm/metrics/paired.py", "from torchmetrics.image import PeakSignalNoiseRatio"),
        ("ldm/net/unet.py", "from .blocks import norm"),
        ("train.py", "import lightning"),
    ],
)
def test_a_violation_is_found(path, source):
    assert len(faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ldm/diffusion/sampler.py", "import math\nimport torch.nn.functional as F\nfrom ldm.tensors import expand"),
        ("ldm/diffusion/times.py", "from ldm.errors import ConfigError"),
        ("ldm/autoencoder/conv.py", "from ldm.net.blocks import norm"),
        ("ldm/training/fit.py", "import lightning as L\nfrom ldm.model import LatentDiffusion"),
        ("ldm/recipes/run.py", "from hydra.utils import instantiate\nfrom ldm import durable, runs"),
        ("ldm/training/loggers.py", "def start():\n    import wandb"),
    ],
)
def test_what_is_allowed_is_not_a_violation(path, source):
    assert not faults(path, source)
