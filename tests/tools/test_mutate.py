"""The lists of tests/tools/mutation/ are of the present source, and the tool that writes them kills what it must."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import mutate
import mutation
import pytest
from mutation import PACKAGES, Project
from named_faults import FAULTS

PROJECT = Project()
NAMED = (  # the faults of the training steps that the list must have
    "condition dropout never applied",
    "the posterior's mean in place of its sample",
    "the adversarial term with the wrong sign",
    "the generator's sign flipped",
    "an adversarial loss of zero",
    "real and fake swapped",
)
SOURCE = """
def add(a, b):
    return a + b


def untested(a):
    return -a


def count(n):
    k = 0
    while k < n:
        k = k + 1
    return k


class Base:
    def __init__(self, a):
        self.a = a

    @property
    def double(self):
        return 2 * self.a


class Derived(Base):
    def __init__(self, a):
        super().__init__(a - 1)


def shift(c):
    def inner(x):
        return x - c

    return inner


MINUS_TWO = shift(2)
"""
TESTS = """
from ldm.model import MINUS_TWO, Derived, add, count

SUMS = [add(1, 2), add(3, 4)]


def test_add():
    assert SUMS == [3, 7]


def test_count():
    assert count(3) == 3


def test_derived():
    assert Derived(3).double == 4


def test_shift():
    assert MINUS_TWO(5) == 3


def test_fails_on_the_original():
    assert MINUS_TWO(5) == 4
"""
ENDLESS = ("count", "k + 1  ->  k")


@pytest.mark.parametrize("package", PACKAGES)
def test_mutation_list_equals_present_source(package):
    assert mutation.staleness(PROJECT, package) == []


def test_mutation_lists_have_proof_of_each_equivalent():
    rows = [row for package in PACKAGES for row in mutation.read_rows(PROJECT.list_file(package))]
    proofs = mutation.read_proofs(PROJECT)
    assert {mutation.row_key(row) for row in rows if row["result"] == "equivalent"} == set(proofs)
    assert all(row["why"] == proofs[mutation.row_key(row)] != "" for row in rows if row["result"] == "equivalent")


def test_mutation_lists_name_existing_tests():
    rows = [row for package in PACKAGES for row in mutation.read_rows(PROJECT.list_file(package))]
    names = {row["killed by"] for row in rows if row["result"] == "killed"}
    missing = []
    for name in names:
        file, _, function = name.partition("::")
        path = PROJECT.tests / file
        if not path.exists() or (function and f"def {function}(" not in path.read_text()):
            missing.append(name)
    assert missing == []


def test_named_faults_are_listed_and_those_of_training_steps_killed():
    killers = {}
    for package in PACKAGES:
        for row in mutation.read_rows(PROJECT.list_file(package)):
            name = row["mutant"].partition(": ")[0]
            if name in {fault.name for fault in FAULTS}:
                killers[name] = row["killed by"]
    assert set(killers) == {fault.name for fault in FAULTS}
    assert all(killers[name] for name in NAMED)


def test_mutation_table_equals_lists():
    readme = (PROJECT.tests / "README.md").read_text()
    shown = readme.partition(mutate.START)[2].partition(mutate.END)[0]
    assert shown == mutation.summary(PROJECT)


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A project of one module after a run of the tool."""
    root = tmp_path_factory.mktemp("toy")
    (root / "ldm").mkdir()
    (root / "tests").mkdir()
    (root / "ldm/__init__.py").touch()
    (root / "ldm/model.py").write_text(SOURCE)
    (root / "tests/test_model.py").write_text(TESTS)
    run(root)
    return root


def run(root: Path, *options: str) -> str:
    command = [sys.executable, mutate.__file__, "--root", str(root), *options]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr  # one survives
    assert "Traceback" not in done.stderr
    return done.stdout


def results(root: Path) -> dict[tuple[str, str], tuple[str, str]]:
    with (root / "tests/tools/mutation/model.csv").open(newline="") as file:
        return {(r["function"], r["mutant"]): (r["result"], r["killed by"]) for r in csv.DictReader(file)}


@pytest.mark.slow  # endless mutants end by CPU time
def test_mutate_kills_what_tests_notice_and_nothing_else(toy):
    found = results(toy)
    assert [key for key, (result, _) in found.items() if result == "survived"] == [("untested", "-a  ->  a")]
    killers = {
        "add": "test_add",  # called while the tests are imported
        "count": "test_count",
        "Base.double": "test_derived",
        "Derived.__init__": "test_derived",
        "shift.inner": "test_shift",
    }
    for (function, _), (result, killer) in found.items():
        if result == "killed":
            assert killer == f"test_model.py::{killers[function]}"
    assert len(found) == 3 + 1 + 1 + 3 + 3 + 2 + 2


@pytest.mark.slow  # endless mutants end by CPU time
def test_mutate_ends_mutants_that_never_end(toy):
    assert results(toy)[ENDLESS] == ("killed", "test_model.py::test_count")


@pytest.mark.slow  # endless mutants end by CPU time
def test_mutate_prints_its_table(toy):
    assert re.search(r"\| `model` \| 15 \| 14 \| 0 \| 1 \| 0 \|", run(toy, "--list"))


@pytest.mark.slow  # endless mutants end by CPU time
def test_stale_run_tries_survivors_again_only(toy):
    (toy / "tests/test_model.py").write_text(TESTS + "\n\ndef test_new():\n    from ldm.model import untested\n")
    assert "model: 1 mutants" in run(toy, "--stale")
