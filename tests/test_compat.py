"""What is not public in other packages is named in one file, and is there."""

import ast
import re
import subprocess
import sys

import pytest
from smoke import ROOT

from ldm import compat

PRIVATE = re.compile(r"^(hydra|torch|lightning|multiprocessing|optuna|omegaconf)(\.\w+)*\._[a-z]\w*")
PACKED = ("torch.ops.mkldnn._", "torch.ops.aten._")  # operators: names in a table, not attributes of a module


def names(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports or reads."""
    read = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            read |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            read |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            read.add(ast.unparse(node))
    return read


def test_private_names_are_used_in_compat_only():
    files = [path for path in (ROOT / "ldm").rglob("*.py") if path != ROOT / "ldm" / "compat.py"]
    private = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in names(ast.parse(path.read_text()))
        if PRIVATE.match(name)
    }
    assert not {one for one in private if not one.partition(": ")[2].startswith(PACKED)}


@pytest.mark.parametrize("name", compat.__all__)
def test_compat_names_exist(name):
    assert getattr(compat, name) is not None


def test_compat_imports_nothing_slow():
    code = "import sys, ldm.compat; sys.exit(bool({'torch', 'hydra', 'lightning'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
