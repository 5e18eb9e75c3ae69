"""Does a test fail when a function is wrong?  python tests/tools/mutate.py [--stale] [--near] [path[:function] ...]

Every function of the packages of `mutation.PACKAGES` is broken in one place at a time: a sign flipped, a term or a
factor dropped, a product made a quotient, a comparison or a condition turned round; and by the faults of
`named_faults.csv`. For each mutant, the quick tests that execute the broken line run in a forked process until one
fails. Writes tests/tools/mutation/PACKAGE.csv and the table of tests/README.md; exit code 1 if a mutant survives that
equivalent.csv does not explain.

path: a package, a file or a folder, as `ldm/training` or `ldm/training/lr.py`; all by default.
--stale: only mutants that were not run, or survived.
--near: only tests of the folders and files named after the packages, in minutes; what survives them may be killed by
    the others.
--list: run nothing; list the mutants of the present source, new ones as not run.
"""

import argparse
import ast
import os
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import mutation
from forked_tests import ForkedTests
from mutation import PACKAGES, Mutant, Project, first_line, functions

START, END = "<!-- mutation -->\n", "\n<!-- /mutation -->"
FOLDERS = (  # of tests/, that have tests of these packages which run in one process
    "adapter",
    "autoencoder",
    "checkpoint",
    "conditioner",
    "data",
    "diffusion",
    "evaluation",
    "metrics",
    "net",
    "plan",
    "sampling",
    "training",
)
SKIPPED = ("diffusion/test_rules.py", "plan/test_plan.py")  # reads source files; whole presets, a minute each


def selected(project: Project, names: list[str], stale: bool) -> dict[str, list[Mutant]]:
    """Return the mutants to try, by package."""
    chosen: dict[str, list[Mutant]] = {}
    for package in PACKAGES:
        listed = mutation.read_list(project, package)
        for mutant in mutation.package_mutants(project, package):
            done = mutant.key in listed and listed[mutant.key]["result"] in ("killed", "equivalent")
            if is_named(mutant, names) and not (stale and done):
                chosen.setdefault(package, []).append(mutant)
    return chosen


def is_named(mutant: Mutant, names: list[str]) -> bool:
    for name in names:
        path, _, function = name.partition(":")
        path = path.removeprefix("ldm/").rstrip("/")
        in_file = mutant.file in (path, f"{path}.py") or mutant.file.startswith(f"{path}/")
        if in_file and (not function or f".{function}." in f".{mutant.function}."):
            return True
    return not names


def test_files(project: Project, near: set[str] | None) -> list[Path]:
    """Return the test files whose tests are run.  near: packages to whose tests, by name, they are limited."""
    every = [
        *project.tests.glob("test_*.py"),
        *(f for name in FOLDERS for f in (project.tests / name).glob("test_*.py")),
    ]
    modules = {f"test_{package}.py" for package in PACKAGES} | {"test_compat.py", "test_engines.py"}
    return [
        file
        for file in sorted(every)
        if file.relative_to(project.tests).as_posix() not in SKIPPED
        and (file.parent != project.tests or file.name in modules)
        and (near is None or file.parent.name in near or file.stem.removeprefix("test_") in near)
    ]


def try_mutants(forked: ForkedTests, chosen: dict[str, list[Mutant]]) -> None:
    """Run the tests on every chosen mutant, and write a package's list after each function."""
    project = forked.project
    for package, mutants in chosen.items():
        started, counts = time.monotonic(), Counter[str]()
        for (file, function), group in groupby(mutants, lambda mutant: (mutant.file, mutant.function)):
            tree = ast.parse((project.source / file).read_text())
            first = next(first_line(node) for name, node in functions(tree) if name == function)
            tried = {}
            for mutant in group:
                killer = forked.killer(mutant, first)
                result = "killed" if killer else "survived"
                counts[result] += 1
                tried[mutant.key] = dict(zip(mutation.COLUMNS, (*mutant.key, result, short(killer), ""), strict=True))
                if not killer and mutant.key not in mutation.read_proofs(project):
                    print(f"survived: {file}:{mutant.lines[0]} {function}: {mutant.text}", flush=True)
            mutation.write_list(project, package, mutation.read_list(project, package) | tried)
        took = (time.monotonic() - started) / len(mutants)
        print(f"{package}: {len(mutants)} mutants, {dict(counts)}, {took:.2f} s each", flush=True)


def short(nodeid: str) -> str:
    """Return the name of a test without its parameters and its first folder."""
    return nodeid.partition("[")[0].removeprefix("tests/")


def write_table(project: Project) -> None:
    """Write the table of the lists into tests/README.md, if it has a place for it."""
    readme = project.tests / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if START in text and END in text:
        before, after = text.partition(START)[0], text.partition(END)[2]
        readme.write_text(before + START + mutation.summary(project) + END + after)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="path[:function]")
    parser.add_argument("--stale", action="store_true", help="only what was not run, or survived")
    parser.add_argument("--near", action="store_true", help="only the tests named after the packages")
    parser.add_argument("--list", action="store_true", help="run nothing, list what is new as not run")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests that a mutant is given")
    parser.add_argument("--root", type=Path, default=Project.root, help="the folder of ldm/ and tests/")
    options = parser.parse_args(arguments)
    project = Project(options.root.resolve())
    chosen = selected(project, options.names, options.stale)
    for package in PACKAGES:  # without what the source has no longer, and with today's proofs
        if project.files(package):
            mutation.write_list(project, package, mutation.read_list(project, package))
    if chosen and not options.list:
        sys.path[:0] = [str(project.root)]
        files = test_files(project, set(chosen) if options.near else None)
        ForkedTests(project, lambda forked: try_mutants(forked, chosen), options.seconds).run(files)
    write_table(project)
    print(mutation.summary(project))
    rows = [row for package in PACKAGES for row in mutation.read_list(project, package).values()]
    return int(any(row["result"] == "survived" for row in rows))


if __name__ == "__main__":
    # read when torch is imported, which is not yet; a process with threads cannot be forked safely
    os.environ.pop("PYTEST_ADDOPTS", None)  # it may name plugins, which are not loaded
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.exit(main(sys.argv[1:]))
