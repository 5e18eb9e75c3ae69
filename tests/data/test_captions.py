import json
from pathlib import Path

import pytest

from ldm.data.captions import annotate, captions_in, known_captions, match, read_list
from ldm.errors import UserError

NAMES = ["a.png", "b.png", "sub/c.png", "sub/red car.png"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.csv", '\ufefffile_name,caption\r\na.png,"one, two"\r\n./sub/c.png,l\'été 3\r\n'),
        ("x.csv", "Caption;text\tImage\n\n".replace(";text", "") + "one, two\ta.png\nl'été 3\tsub\\c.png\n"),
        ("x.tsv", "path\tprompt\na.png\tone, two\nc.png\tl'été 3\n"),
        ("x.jsonl", '{"file": "a.png", "text": "one, two"}\n\n{"file": "sub/c.png", "text": ["l\'été 3"]}\n'),
    ],
)
def test_captions_list_formats(tmp_path, name, text):
    told = annotate(tmp_path, NAMES, write(tmp_path / name, text))
    assert told.texts == [["one, two"], ["b"], ["l'été 3"], ["red car"]]
    assert told.notes == [f"captions from {name}", "2 not in it: b.png, sub/red car.png"]
    assert told.classes == {"image": ["one, two", "b", "l'été 3", "red car"]}


def test_captions_list_in_folder_takes_precedence(tmp_path):
    write(tmp_path / "a.txt", "beside")
    assert annotate(tmp_path, ["a.png"]).texts == [["beside"]]
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "listed"}))
    assert annotate(tmp_path, ["a.png"]).texts == [["listed"]]
    assert annotate(tmp_path, ["a.png"], write(tmp_path / "mine.csv", "file,caption\na.png,mine\n")).texts == [["mine"]]


def test_captions_list_with_repeated_and_empty_rows():
    rows = [("a.png", ["one"]), ("a.png", ["two"]), ("b.png", []), ("gone.png", ["x"]), ("c.png", ["by its bare name"])]
    texts, notes = match(Path("x.csv"), rows, NAMES)
    assert texts == [["one", "two"], [], ["by its bare name"], []]
    assert notes == [
        "captions from x.csv",
        "2 not in it: b.png, sub/red car.png",
        "1 of its rows without an image: gone.png",
    ]
    texts, _ = match(
        Path("x.csv"),
        [("c.png", ["?"]), ("sub/c.png", ["!"]), ("1/x", ["which?"])],
        ["other/c.png", "sub/c.png", "1/x", "2/x"],
    )
    assert texts == [[], ["!"], ["which?"], []], "a bare name that two have says nothing"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.csv", "", "no rows"),
        ("x.csv", "file,words\na.png,x\n", "row 2 has file, words; expected columns one of file_name"),
        ("x.csv", "caption\nx\n", "row 2 has caption; expected"),
        ("x.jsonl", '{"file": "a.png", "caption": "x"}\n[1]\n', "row 2 is not a JSON object"),
        ("x.jsonl", "{broken", "row 1 is not a JSON object"),
        (
            "x.csv",
            "file,caption\nz.png,x\n",
            "none of 1 rows names an image, z.png; the images are a.png, b.png, sub/c.png, ...",
        ),
    ],
)
def test_captions_list_reports_mismatch_in_one_line(tmp_path, name, text, said):
    with pytest.raises(UserError, match=said) as error:
        annotate(tmp_path, NAMES, write(tmp_path / name, text))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_captions_in_json_accepts_nested_forms():
    assert captions_in(" a  cat ") == ["a cat"]
    assert captions_in(["a", {"raw": "b"}, {"text": ["c", "d"]}, 7, 0.5]) == ["a", "b", "c", "d", "7", "0.5"]
    assert captions_in({"caption": "x", "raw": "y"}) == ["x"]
    for nothing in (None, "", " ", [], [None, ""], True, {"id": 3}, {"raw": {"raw": "x"}}):
        assert captions_in(nothing) == []


@pytest.mark.parametrize(("names", "beside"), [(["a/x.png", "y.png"], False), (["a/x.png", "b/y.png"], True)])
def test_captions_of_classes_need_images_in_class_folders_without_captions(tmp_path, names, beside):
    classes = write(tmp_path / "classes.json", '{"a": ["an a"], "b": ["a b"]}')
    assert annotate(tmp_path, ["a/x.png", "b/y.png"], classes).classes == {"a": ["an a"], "b": ["a b"]}
    if beside:
        (tmp_path / "a").mkdir()
        write(tmp_path / "a" / "x.txt", "beside")
    with pytest.raises(UserError, match=r"classes\.json gives captions to classes, but"):
        annotate(tmp_path, names, classes)


def test_captions_list_reports_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"captions=.*x\.csv: No such file"):
        annotate(tmp_path, NAMES, tmp_path / "x.csv")
    assert read_list(write(tmp_path / "x.csv", "file,caption\na.png\n")) == [("a.png", [])], (
        "a row cut short has no caption"
    )


class Endless:
    """A stream that has captions and no end."""

    captions = ()

    def all_captions(self):
        raise AssertionError


def test_captions_are_known_of_data_with_an_end_that_list_them():
    class Listed(Endless):
        captions = (("a cat", "one cat"),)

        def all_captions(self):
            return ["b", "a cat", "b"]

        def __len__(self):
            return 3

    assert known_captions(Listed()) == ["", "b", "a cat", "one cat"]
    assert known_captions(Endless()) is None
    assert known_captions([1, 2]) is None
