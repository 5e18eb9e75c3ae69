"""The parity table of experiments/README.md equals its csv, its figures are in bounds, and its commands compose."""

import csv
import importlib.util
import re
import shlex

import pytest
from smoke import ROOT, plan_of

FOLDER = ROOT / "experiments" / "parity"


def rows(name: str) -> list[dict[str, str]]:
    with open(FOLDER / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("parity_table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_parity_table_equals_its_csv(table):
    readme = (ROOT / "experiments" / "README.md").read_text()
    shown = re.search(r"<!-- parity -->\n(.*?)\n<!-- /parity -->", readme, re.DOTALL)[1]
    assert shown == table.markdown(rows("parity"))


def test_parity_table_covers_every_model_within_bounds(table):
    found = rows("parity")
    assert [row["model"] for row in found] == [row.model for row in table.ROWS]
    for row in found:
        assert row["published"] == "the same"
        low, high = (float(number) for number in re.findall(r"([\d.]+e[+-]\d+) in", row["difference"]))
        assert low <= 1e-4
        assert high <= 1e-5
        assert row["ours"].startswith("not run: needs")


@pytest.mark.parametrize("row", rows("parity"), ids=lambda row: row["model"])
def test_parity_command_composes(row):
    _, script, *typed = shlex.split(row["command"])
    if script == "train.py":
        typed = [re.sub("IMAGENET|OPENIMAGES", ".", word) for word in typed]
    plan_of(*typed, name=script.removesuffix(".py")).check()


def test_measured_memory_is_within_15_percent_of_plan():
    found = rows("memory")
    assert [row["batch"] for row in found] == ["1", "2"]
    assert all(abs(int(row["measured_MiB"]) / int(row["plan_MiB"]) - 1) <= 0.15 for row in found)
