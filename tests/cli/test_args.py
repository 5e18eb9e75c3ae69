"""Options of the small commands: read by a function's signature, a mistake in one line."""

import pytest

from ldm.cli.args import choose, read_signature
from ldm.errors import UserError

SOURCE = '''
from collections.abc import Sequence


def paint(
    run: str,  # a run folder
    num: int = 4,  # images
    scale: float = 1.5,  # of the guidance
    names: Sequence[str] = ("linear", "cosine"),  # of schedules
    crop: Sequence[float] | None = None,
):
    """Paint it.

    Twice.
    """
'''


@pytest.fixture
def paint(tmp_path):
    (tmp_path / "paint.py").write_text(SOURCE)
    found = read_signature(tmp_path / "paint.py", "paint")
    assert found is not None
    assert read_signature(tmp_path / "paint.py", "other") is None
    return found


def test_options_are_parsed_as_annotated(paint):
    read = paint.parse(["run=a=b", "num=7", "scale=2", "names=x,y", "crop=1,2"])
    assert read == {"run": "a=b", "num": 7, "scale": 2.0, "names": ["x", "y"], "crop": [1.0, 2.0]}
    assert paint.parse(["run=r", "crop=null"]) == {"run": "r", "crop": None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=r", "nmu=4"], "nmu=4: no key 'nmu'; did you mean 'num'?"),
        (["run=r", "num=four"], "num=four: expected a whole number"),
        (["run=r", "num=1.5"], "num=1.5: expected a whole number"),
        (["run=r", "scale=nan"], "scale=nan: expected a number"),
        (["run=r", "crop=1,b"], "crop=1,b: expected numbers such as 1,2,4"),
        (["run=r", "num=null"], "num=null: expected a whole number"),
        (["run=r", "num=1", "num=2"], "num= is given twice"),
        (["run"], "'run' is not key=value"),
        (["num=1"], "run=... must be given: a run folder"),
    ],
)
def test_options_report_error_in_one_line(paint, words, said):
    with pytest.raises(UserError) as error:
        paint.parse(words)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_describe_shows_defaults_as_typed(paint):
    lines = paint.describe().splitlines()
    assert lines[0] == "Paint it."
    assert [" ".join(line.split()) for line in lines[-5:]] == [
        "run=... a run folder",
        "num=4 images",
        "scale=1.5 of the guidance",
        "names=linear,cosine of schedules",
        "crop=null",
    ]


def test_choose_suggests_nearest():
    assert choose("schedule", "schedule", "cosine", ["linear", "cosine"]) == "cosine"
    with pytest.raises(UserError, match="schedule=cosin: no such schedule; did you mean 'cosine'"):
        choose("schedule", "schedule", "cosin", ["linear", "cosine"])
