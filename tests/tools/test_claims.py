"""Every number that a README claims is in a csv and equals it; generated tables equal their csv."""

import csv
import importlib.util
import sys
from pathlib import Path

import claims
import pytest

from ldm.report import rows, table

CLAIMS = list(claims.read_claims())
ROOT = claims.ROOT


@pytest.mark.parametrize("readme", claims.READMES)
def test_readme_numbers_equal_their_csv(readme):
    differing = [row for one in CLAIMS if one.readme == readme for row in claims.check(one) if row["agrees"] != "yes"]
    assert differing == []
    assert claims.misplaced(readme, CLAIMS) == [], "change them in tests/tools/claims.txt too"
    assert claims.unlisted(readme, CLAIMS) == [], "list them in tests/tools/claims.txt, or take them out"


def test_claims_name_existing_readmes_and_sources():
    assert {one.readme for one in CLAIMS} <= set(claims.READMES)
    assert all(one.source in claims.KINDS or claims.source_path(one).is_file() for one in CLAIMS)


def test_claims_table_is_written_by_command():
    with open(claims.TABLE, newline="") as file:
        stored = list(csv.DictReader(file))
    assert stored == [row for one in CLAIMS for row in claims.check(one)], "run python tests/tools/claims.py"


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """A README with a csv beside it, and no other."""
    (tmp_path / "r.csv").write_text('a,note,seed,fd\nx,"p, q",0,1.0\nx,"p, q",1,3.0\ny,z,0,0.256\ny,z,1,0.5\n')
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    monkeypatch.setattr(claims, "LISTED", tmp_path / "claims.txt")
    monkeypatch.setattr(claims, "TABLE", tmp_path / "claims.csv")
    monkeypatch.setattr(claims, "READMES", ["README.md"])
    claims.rows_of.cache_clear()

    def write(text: str, listed: str) -> Path:
        (tmp_path / "README.md").write_text(text)
        (tmp_path / "claims.txt").write_text(listed)
        monkeypatch.setattr(claims.read_claims, "__defaults__", (tmp_path / "claims.txt",))
        return tmp_path

    yield write
    claims.rows_of.cache_clear()


LISTED = "# README.md r.csv\nthe distance is 2.0, the other's 26%\n= mean{fd|a=x}; at{fd|a=y, seed=0}\n"


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("the distance is 2.0,\nthe other's 26%, after 300 steps (Ho et al. 2020, tab. 3).", 0, "2 numbers, 0 differ"),
        ("the distance is 2.0, the other's 26%, a third 7.5", 1, "other's 26%, a third <7.5>"),
        ("the distance is 2.0, the other's 26%\n\n```sh\npython train.py a=7.5\n```\n`9`", 0, "0 not listed"),
    ],
)  # fmt: skip
def test_claims_command_reports_unlisted_numbers(readme, capsys, text, code, message):
    readme(text, LISTED)
    assert claims.main() == code
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(("old", "new"), [("1.0", "1.2"), ("0.256", "0.266")])
def test_claims_command_reports_changed_csv(readme, capsys, old, new):
    folder = readme("the distance is 2.0, the other's 26%", LISTED)
    assert claims.main() == 0
    (folder / "r.csv").write_text((folder / "r.csv").read_text().replace(old, new))
    claims.rows_of.cache_clear()
    assert claims.main() == 1
    assert "1 differ from their csv" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["the distance is 2.1, the other's 26%", "the distance is 2.0, the other's 26% " * 2])
def test_claims_text_must_occur_once(readme, capsys, text):
    readme(text, LISTED)
    assert claims.main() == 1
    assert "README.md: not once in it: the distance is 2.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("mean{fd|note=p, q}", 2),
        ("min{fd} + max{fd}", 3.256),
        ("count{|seed=1}", 2),
        ("count{a}", 2),
        ("sum{fd|seed>=1}", 3.5),
        ("diff{fd|a=x|a=y}", (0.744 + 2.5) / 2),
        ("high{fd|a=x|a=y} + low{fd|a=x|a=y}", 0.744 + 2.5),
        ("slope{fd|seed|a=x}", 2),
        ("100 * (at{fd|a=x, seed=1} - 1)", 200),
    ],
)
def test_claim_expression_has_known_value(readme, expression, value):
    readme("", "")
    claim = claims.Claim("README.md", "r.csv", "", ())
    assert claims.evaluate(claim, expression) == pytest.approx(value)


@pytest.mark.parametrize(
    ("number", "value", "agree"),
    [
        ("2.0", 2.0499, True),
        ("2.0", 2.06, False),
        ("1,200", 1200.4, True),
        ("1,200", 1201, False),
        ("26%", 0.2649, True),
        ("26%", 0.27, False),
        ("-0.1", -0.149, True),
        ("-0.1", 0.1, False),
        ("5.5e-6", 5.54e-6, True),
        ("5.5e-6", 5.6e-6, False),
    ],
)
def test_agrees_to_written_places(number, value, agree):
    assert claims.agrees(number, value) == agree


def load(path: str):
    file = ROOT / "experiments" / path
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("study", ["augmentation", "families", "peers", "speed"])
def test_generated_table_equals_csv(study):
    folder = ROOT / "experiments" / study
    found = rows.read(folder / "results.csv")
    if study == "peers":
        floor = next(float(row["fd_fashion"]) for row in found if row["who"] == "reconstructions")
        models = sorted((row for row in found if row["who"] != "reconstructions"), key=lambda row: int(row["seed"]))
        lines = list(load("peers/told.py").lines(models, floor))
    elif study == "speed":
        sys.path.insert(0, str(folder))
        try:
            cells = load("speed/measure.py").cells
        finally:
            sys.path.remove(str(folder))
        lines = ["| " + " | ".join(cells(row)) + " |" for row in found]
    else:
        lines = list(load(f"{study}/measure.py").lines(found))
    shown = table.read_block((folder / "README.md").read_text(), "table").splitlines()
    assert shown[2:] == lines[-len(shown) + 2 :]
    assert len(shown) - 2 == len(lines) - (0 if study == "speed" else 2)
