"""`pip install -e .` is enough for the main job; what an option needs beside it is an extra, which its error names."""

import importlib.metadata
import os
import subprocess
import sys
import venv

import pytest
from smoke import ROOT

from ldm.errors import UserError

tomllib = pytest.importorskip("tomllib")  # Python 3.11
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def clip():
    from ldm.conditioner.clip import CLIP

    CLIP("ViT-B-32-quickgelu", random=True)


def inception():
    from ldm.metrics.features import Inception

    Inception()


def efficientnet():
    from ldm.net.pretrained import load_efficientnet_lite0

    load_efficientnet_lite0()


def dinov2():
    from ldm.metrics.foundation import DINOv2

    DINOv2("vit_large_patch14_dinov2.lvd142m", __file__)


def wandb():
    from ldm.training.loggers import WandB

    WandB()


def compare():
    from ldm.report.compare import format_comparison

    format_comparison([])


def read_molecule():
    from ldm.io.molecules import read_molecule

    read_molecule("CCO")


def selfies():
    from ldm.io.molecules import from_selfies

    from_selfies("[C]")


def chemnet():
    from ldm.metrics.molecules import chemnet_features

    chemnet_features(["CCO"])


@pytest.mark.parametrize(
    ("extra", "module", "use"),
    [
        ("clip", "open_clip", clip),
        ("metrics", "torch_fidelity", inception),
        ("metrics", "timm", efficientnet),
        ("metrics", "timm", dinov2),
        ("wandb", "wandb", wandb),
        ("report", "rich", compare),
        ("molecules", "rdkit", read_molecule),
        ("molecules", "selfies", selfies),
        ("molecules", "fcd", chemnet),
    ],
)
def test_missing_package_names_its_extra(extra, module, use, monkeypatch):
    from ldm.metrics.features import Inception

    monkeypatch.setattr(Inception, "find", classmethod(lambda cls, weights: None), raising=True)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package {module}: pip install -e '\.\[{extra}\]'$"):
        use()
    assert any(line.replace("-", "_").startswith(module) for line in PROJECT["optional-dependencies"][extra])


def test_dev_has_every_extra_that_a_test_needs():
    extras = PROJECT["optional-dependencies"]
    lines = {line for name, lines in extras.items() if name not in ("dev", "pictures") for line in lines}
    assert lines <= set(extras["dev"])
    assert not set(PROJECT["dependencies"]) & lines


def required(lines):
    """Return the names of the installed distributions that a list of requirements brings in all, extras left out."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    names, left = set(), [(Requirement(line), ()) for line in lines]
    while left:
        requirement, extras = left.pop()
        applies = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        )
        name = canonicalize_name(requirement.name)
        if not applies or (name in names and not requirement.extras):
            continue
        try:
            inner = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:  # of another build of torch
            continue
        names.add(name)
        left += [(Requirement(line), tuple(requirement.extras)) for line in inner]
    return names


@pytest.mark.slow
def test_main_job_runs_with_the_dependencies_alone(tmp_path):
    """In an environment that has only what `pip install -e .` installs, linked from this one."""
    venv.create(tmp_path / "env", symlinks=True)
    (packages,) = tmp_path.glob("env/lib/python*/site-packages")
    names = required(PROJECT["dependencies"])
    assert "hydra-core" in names
    assert not names & {"open-clip-torch", "timm", "torch-fidelity", "rich", "wandb", "transformers", "matplotlib"}
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link, source = packages / top, distribution.locate_file(top)
            if not link.exists() and os.path.exists(source):
                link.symlink_to(source)
    job = ["budget=smoke", "metrics=full", "trainer=cpu", f"runs={tmp_path / 'runs'}"]
    run = subprocess.run(
        [tmp_path / "env/bin/python", ROOT / "train.py", *job],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "LDM_CACHE": str(tmp_path / "cache"), "LDM_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert list(tmp_path.glob("runs/*/metrics.json"))
