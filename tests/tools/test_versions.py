"""The command that runs the quick suite under other versions: its rows are pyproject's bounds, and its table says what
a report says.
"""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytest.importorskip("tomllib")  # Python 3.11

import versions

REPORT = """<testsuites><testsuite name="pytest" tests="4">
<testcase classname="tests.net.test_unet" name="test_one"/>
<testcase classname="tests.net.test_unet" name="test_two[a]"><failure/></testcase>
<testcase classname="tests.test_ema" name="test_three"><error/></testcase>
<testcase classname="tests.test_ema" name="test_four"><skipped/></testcase>
</testsuite></testsuites>"""


def test_requirements_of_pyproject_are_unique():
    found = {one.name: str(one.specifier) for one in versions.requirements(versions.ROOT / "pyproject.toml")}
    assert {"torch", "lightning", "hydra-core", "transformers", "pytest", "diffusers"} <= found.keys()
    assert len(found) == len(versions.requirements(versions.ROOT / "pyproject.toml"))
    assert all(">=" in bound for bound in found.values())  # or there would be no lowest
    assert found["hydra-core"].split(",").count("<1.4") == 1


@pytest.mark.parametrize(
    ("line", "there", "expected"),
    [
        ("torch>=2.9", ["2.10.0", "2.9.0rc1", "2.9.0", "2.8.0"], "torch==2.9.0"),
        ("timm>=1.0", ["1.0.9", "1.0.3", "0.9.1"], "timm==1.0.3"),  # there is no 1.0.0
        ("imageio[ffmpeg]>=2.33", ["2.40", "2.33.1"], "imageio[ffmpeg]==2.33.1"),
    ],
)
def test_lowest_is_first_release_in_bounds(line, there, expected):
    assert versions.lowest(Requirement(line), there) == expected
    with pytest.raises(ValueError, match="within the bounds"):
        versions.lowest(Requirement(line), ["0.1"])


def test_report_replaces_its_line(tmp_path):
    line = dict.fromkeys(versions.COLUMNS, "") | {"versions": "today", "python": "3.11"} | versions.outcome(REPORT)
    assert (line["passed"], line["failed"], line["not run"]) == ("1", "2", "1")
    assert line["names of failed"] == "tests/net/test_unet::test_two[a]; tests/test_ema::test_three"
    versions.write(line | {"passed": "0"}, tmp_path / "t.csv")
    versions.write(dict.fromkeys(versions.COLUMNS, "") | {"versions": "lowest", "python": "3.10"}, tmp_path / "t.csv")
    versions.write(line, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["versions"], row["passed"]) for row in rows] == [("lowest", ""), ("today", "1")]


def test_failed_test_that_passes_alone_is_not_failed():
    first = {"passed": "7", "failed": "2", "not run": "3", "names of failed": "a::one; a::two"}
    again = {"passed": "1", "failed": "1", "not run": "0", "names of failed": "a::two"}
    line = versions.combine(first, again)
    assert (line["passed"], line["failed"], line["not run"]) == ("8", "1", "3")
    assert (line["names of failed"], line["passed alone"]) == ("a::two", "a::one")
    assert versions.combine(first, {"names of failed": "pytest ended with exit code 3"}) == first


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("def test_one():\n    pass", 0, {"passed": "1", "failed": "0", "not run": "0", "names of failed": ""}),
        (
            "def test_one():\n    assert False",
            1,
            {"passed": "0", "failed": "1", "not run": "0", "names of failed": "test_a::test_one"},
        ),
        ("import nothing_of_this_name", 2, {"names of failed": "pytest ended with exit code 2"}),
    ],
)
def test_suite_that_does_not_finish_has_no_counts(tmp_path, monkeypatch, body, code, expected):
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # quicker
    (tmp_path / "test_a.py").write_text(body)
    assert versions.run(Path(sys.executable), tmp_path) == (code, expected)


def test_pip_error_names_requirement(tmp_path, monkeypatch):
    (tmp_path / "constraints.txt").write_text("packaging<1")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    with pytest.raises(ValueError, match=r"^ERROR: .*no_such_file"):
        versions.pip(Path(sys.executable), "--no-index", "-r", tmp_path / "no_such_file")
    versions.pip(Path(sys.executable), "--no-index", "--dry-run", "packaging")  # the constraint does not count


def test_interpreter_has_named_version():
    here = ".".join(map(str, sys.version_info[:2]))
    found = versions.interpreter(here)
    if found is not None:
        done = subprocess.run(
            [found, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        assert done.stdout.strip() == here
    assert versions.interpreter("3.1") is None


def test_missing_interpreter_is_a_table_row(tmp_path):
    assert versions.measure(versions.Row("today", "3.1"), tmp_path)["names of failed"] == "no Python 3.1 here"


def test_failed_tests_that_pass_now_are_counted(tmp_path, monkeypatch):
    row, ran = versions.Row("lowest", "3.10"), []
    line = dict.fromkeys(versions.COLUMNS, "") | {"versions": "lowest", "python": "3.10", "passed": "7", "failed": "2"}
    line["names of failed"] = "tests/data/test_a::test_x[1]; tests/test_b::test_y"
    monkeypatch.setattr(versions, "interpreter", lambda version: tmp_path)
    monkeypatch.setattr(versions, "build", lambda row, base, folder: folder / "python")
    monkeypatch.setattr(versions, "installed", lambda python: {"torch": "2.9.0"})
    outcome = {"passed": "1", "failed": "1", "not run": "0", "names of failed": "tests/test_b::test_y"}
    monkeypatch.setattr(versions, "run", lambda python, folder, *words: ran.append(words) or (1, outcome))
    found = versions.run_failed(line, row, tmp_path)
    assert ran == [("-n0", "tests/data/test_a.py::test_x[1]", "tests/test_b.py::test_y")]
    assert found == line | {"passed": "8", "failed": "1", "names of failed": "tests/test_b::test_y", "torch": "2.9.0"}
    outcome |= {"passed": "0"}
    with pytest.raises(ValueError, match="could be run"):
        versions.run_failed(line, row, tmp_path)


def test_list_prints_environments_without_building(capsys):
    before = Path(versions.TABLE).exists()
    assert versions.main(["--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in shown] == [
        f"{row.versions} on Python {row.python}" for row in versions.ROWS
    ]
    assert all("torch>=2.9" in line for line in shown)
    assert Path(versions.TABLE).exists() == before
    assert versions.main(["--list", "today", "3.11"]) == 0
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == ["today on Python 3.11"]
    assert versions.main(["everything"]) == 2
    assert versions.main(["--help"]) == 0
