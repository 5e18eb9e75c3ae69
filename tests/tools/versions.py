"""Does the quick suite pass with every version that pyproject.toml promises?

    python tests/tools/versions.py [lowest|today|newest] ... [3.10|3.11|3.13] ... [--failed|--list]

For each row a new environment outside the checkout: the lowest version that each bound allows, what pip installs today,
and the newest including pre-releases, on the Pythons in ROWS.  Needs Python 3.11, a package registry and 8 GB of disk
for one row at a time.  PYTEST_ADDOPTS is passed on: PYTEST_ADDOPTS=-n1 runs the suite in one process.

Writes tests/tools/versions.csv, one line for each environment as soon as it is done, those without an interpreter or
that cannot be installed too; lines of environments that are not named stay.  Exit code 1 if a test failed or an
environment could not be made.  --failed: only the tests that failed, of lines that have some, whose outcome on the
present source is put into the line.  --list: say what would run, and do nothing.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "tools" / "versions.csv"
SHOWN = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "transformers",
    "diffusers",
    "peft",
    "safetensors",
    "torchmetrics",
    "numpy",
)
COLUMNS = ("versions", "python", "date", *SHOWN, "passed", "failed", "not run", "names of failed", "passed alone")


@dataclass(frozen=True)
class Row:
    """An environment.  versions: lowest, today or newest.  python: major.minor."""

    versions: str
    python: str


ROWS = (Row("lowest", "3.10"), Row("today", "3.10"), Row("today", "3.11"), Row("today", "3.13"), Row("newest", "3.13"))


LEFT_OUT = {  # of a row: a package, and what tests it
    # needs huggingface-hub 1.10, which no transformers below 5 takes
    "lowest": {"trackio": "tests/training/test_loggers.py::test_trackio_has_run_once_after_resume_and_asks_no_network"},
}


OLDER = {  # of a row: tests of what its packages do not have yet
    # diffusers 0.35 has no magnitude-aware guider
    "lowest": ["tests/diffusion/test_cfg_variants.py::test_variant_equals_guider_of_diffusers"],
}


def requirements(pyproject: Path) -> list[Requirement]:
    """What the quick suite needs: the dependencies and those of the extra `dev`, one for each package."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    named = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    return list({one.name: one for one in named}.values())


def lowest(requirement: Requirement, available: Iterable[str]) -> str:
    """The requirement at the lowest release that its bounds allow. Raises ValueError where there is none."""
    allowed = [
        version for version in map(Version, available) if not version.is_prerelease and version in requirement.specifier
    ]
    if not allowed:
        raise ValueError(f"{requirement}: none of the registry's versions is within the bounds")
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}=={min(allowed)}"


def available(python: Path, name: str) -> list[str]:
    """The releases of a package that the registry has for this Python, by pip. Raises CalledProcessError."""
    done = subprocess.run([python, "-m", "pip", "index", "versions", name], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("Available versions:"))
    return line.removeprefix("Available versions:").replace(" ", "").split(",")


def interpreter(version: str) -> Path | None:
    """A Python of this major.minor: on the path, of pyenv, or of uv; None where there is none."""
    candidates = [path] if (path := shutil.which(f"python{version}")) else []
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates += sorted(
        (str(path) for path in pyenv.glob(f"{version}.*/bin/python")), key=lambda path: Version(Path(path).parts[-3])
    )
    if uv := shutil.which("uv"):
        candidates += subprocess.run([uv, "python", "find", version], capture_output=True, text=True).stdout.split()
    say = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in candidates:
        try:
            done = subprocess.run([path, "-c", say], capture_output=True, text=True)
        except OSError:
            continue
        if (
            done.returncode == 0 and done.stdout.strip() == version
        ):  # a shim of pyenv is there for versions that are not active
            return Path(path)
    return None


def installed(python: Path) -> dict[str, str]:
    """The version of every package of SHOWN in an environment."""
    done = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True)
    versions = dict(line.split("==", 1) for line in done.stdout.splitlines() if "==" in line)
    normal = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in versions.items()}
    return {name: normal.get(name, "") for name in SHOWN}


def outcome(report: str) -> dict[str, str]:
    """passed, failed, not run (skipped) and the names of the failed tests, of pytest's report in JUnit's XML."""
    failed, passed, skipped = [], 0, 0
    for case in ElementTree.fromstring(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    names = sorted(set(failed))
    counts = {"passed": passed, "failed": len(names), "not run": skipped}
    return {name: str(count) for name, count in counts.items()} | {"names of failed": "; ".join(names)}


def pip(python: Path, *words: object) -> None:
    """Install into an environment. Raises ValueError with pip's own first error.

    The bounds are pyproject's alone: constraints that the machine sets for pip do not count.
    """
    env = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run([python, "-m", "pip", "install", "-q", *words], stderr=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise ValueError(errors[0] if errors else f"pip ended with exit code {done.returncode}")


def build(row: Row, base: Path, folder: Path) -> Path:
    """Make an environment in a folder and return its Python. Raises ValueError, CalledProcessError."""
    python = folder / "venv" / "bin" / "python"
    subprocess.run([base, "-m", "venv", folder / "venv"], check=True)
    pip(python, "--upgrade", "pip", "setuptools>=77", "wheel")
    needed = [one for one in requirements(ROOT / "pyproject.toml") if one.name not in LEFT_OUT.get(row.versions, {})]
    if row.versions == "lowest":
        pip(python, *[lowest(one, available(python, one.name)) for one in needed])
    else:
        pip(python, *(["--pre", "--upgrade"] if row.versions == "newest" else []), *map(str, needed))
    pip(python, "--no-deps", "--no-build-isolation", "-e", ROOT)
    return python


def run(python: Path, folder: Path, *options: str) -> tuple[int, dict[str, str]]:
    """pytest's exit code and outcome in an environment, with an empty cache of models and data."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(ROOT),
        "LDM_CACHE": str(folder / "ldm"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    words = [f"--junitxml={report}", f"--basetemp={folder / 'tests'}", "-o", f"cache_dir={folder / 'cache'}"]
    code = subprocess.run([python, "-m", "pytest", *words, *options], cwd=ROOT, env=env).returncode
    if code not in (0, 1) or not report.is_file():  # 1: a test failed
        return code, {"names of failed": f"pytest ended with exit code {code}"}
    return code, outcome(report.read_text(encoding="utf-8"))


def measure(row: Row, folder: Path) -> dict[str, str]:
    """The line of an environment that is made in an empty folder; what fails in it runs once more, alone."""
    line = dict.fromkeys(COLUMNS, "") | {"versions": row.versions, "python": row.python}
    line["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    base = interpreter(row.python)
    if base is None:
        return line | {"names of failed": f"no Python {row.python} here"}
    try:
        python = build(row, base, folder)
    except (subprocess.CalledProcessError, ValueError) as error:
        return line | {"names of failed": f"cannot be installed: {' '.join(str(error).split())[:200]}"}
    line |= installed(python)
    deselected = [*LEFT_OUT.get(row.versions, {}).values(), *OLDER.get(row.versions, [])]
    code, first = run(python, folder, *(f"--deselect={test}" for test in deselected))
    return line | (first if code != 1 else combine(first, run(python, folder, "-n0", "--last-failed")[1]))


def run_failed(line: dict[str, str], row: Row, folder: Path) -> dict[str, str]:
    """The line with the outcome of its failed tests on the present source, in a new environment of its row."""
    base = interpreter(row.python)
    if base is None:
        return line
    python = build(row, base, folder)
    failed = line["names of failed"].split("; ")
    nodes = [name.replace("::", ".py::", 1) for name in failed]
    again = run(python, folder, "-n0", *nodes)[1]
    if int(again.get("passed", 0)) + int(again.get("failed", 0)) != len(failed):
        raise ValueError(f"{row.versions} on Python {row.python}: not all of {line['names of failed']} could be run")
    passed = str(int(line["passed"]) + int(again["passed"]))
    return line | installed(python) | {name: again[name] for name in ("failed", "names of failed")} | {"passed": passed}


def combine(first: dict[str, str], again: dict[str, str]) -> dict[str, str]:
    """The outcome of a suite whose failed tests ran again: one that passed alone failed by the machine's load."""
    if "failed" not in again:
        return first
    names = first["names of failed"].split("; ")
    alone = [name for name in names if name not in again["names of failed"].split("; ")]
    passed = str(int(first["passed"]) + len(alone))
    return (
        first
        | {name: again[name] for name in ("failed", "names of failed")}
        | {
            "passed": passed,
            "passed alone": "; ".join(alone),
        }
    )


def read(table: Path) -> list[dict[str, str]]:
    """The lines of the table, none if it is not there."""
    return list(csv.DictReader(table.open(newline="", encoding="utf-8"))) if table.is_file() else []


def write(line: dict[str, str], table: Path) -> None:
    """Put an environment's line into the table, in place of an earlier one of the same."""
    lines = read(table)
    key = ("versions", "python")
    lines = [one for one in lines if any(one[name] != line[name] for name in key)] + [line]
    order = [(row.versions, row.python) for row in ROWS]
    lines.sort(
        key=lambda one: (
            order.index((one["versions"], one["python"])) if (one["versions"], one["python"]) in order else len(order)
        )
    )
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    names, pythons = {row.versions for row in ROWS}, {row.python for row in ROWS}
    if {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    if unknown := [word for word in argv if word not in {*names, *pythons, "--failed", "--list"}]:
        expected = ", ".join(sorted(names | pythons))
        print(f"error: {unknown[0]}: expected {expected}, --failed or --list", file=sys.stderr)
        return 2
    chosen = [
        row
        for row in ROWS
        if (row.versions in argv or not names & set(argv)) and (row.python in argv or not pythons & set(argv))
    ]
    bad = 0
    for row in chosen:
        if "--list" in argv:
            needed = ", ".join(map(str, requirements(ROOT / "pyproject.toml")))
            print(f"{row.versions} on Python {row.python} ({interpreter(row.python) or 'not here'}): {needed}")
            continue
        before = {(one["versions"], one["python"]): one for one in read(TABLE)}.get((row.versions, row.python), {})
        if "--failed" in argv and before.get("failed", "0") in ("", "0"):
            continue
        with tempfile.TemporaryDirectory(prefix="ldm-versions-") as folder:
            line = run_failed(before, row, Path(folder)) if "--failed" in argv else measure(row, Path(folder))
        write(line, TABLE)
        print(" ".join(f"{name} {line[name]}" for name in COLUMNS if line[name]), flush=True)
        bad += line["failed"] != "0"
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
