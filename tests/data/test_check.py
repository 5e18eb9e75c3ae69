import csv
import io
import tarfile

import pytest
from PIL import Image

from ldm.data.check import check_image, list_images, main
from ldm.data.quarantine import quarantined_rows
from ldm.errors import UserError

BROKEN = b"<html>"


def picture(red: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), (red, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


CONTENT = {"a.png": picture(1), "b.png": BROKEN, "sub/c.png": picture(3)}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    for name, data in CONTENT.items():
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pictures" / name).write_bytes(data)
    return tmp_path / "pictures"


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "shards").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as tar:
            for name, data in CONTENT.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path / "shards"


def test_list_images_of_a_folder_a_shard_and_a_pattern(folder, shards):
    readers, files = list_images(str(folder))
    assert [name for name, _ in readers] == [str(folder / name) for name in CONTENT]
    assert files == {str(folder / name): str(folder / name) for name in CONTENT}
    assert [read() for _, read in readers] == [*CONTENT.values()]
    for path, numbers in ((shards, (0, 1)), (shards / "1.tar", (1,)), (shards / "{0..1}.tar", (0, 1))):
        readers, files = list_images(str(path))
        assert [read() for _, read in readers] == [*CONTENT.values()] * len(numbers), path
        assert [files[name] for name, _ in readers] == [str(shards / f"{i}.tar") for i in numbers for _ in CONTENT]


def test_check_command_reports_and_quarantines_what_cannot_be_read(folder, tmp_path, capsys):
    assert main([str(folder), f"out={tmp_path}/report.csv"]) == 0
    fault = f"{folder}/b.png: cannot identify image file\n"
    assert capsys.readouterr().out.endswith(f"{fault}{folder}: 2 of 3 images can be read, 1 quarantined\n")
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["size"], row["width"], row["height"], row["fault"]) for row in rows] == [
        (str(folder / "a.png"), str(len(CONTENT["a.png"])), "12", "8", ""),
        (str(folder / "b.png"), "6", "0", "0", "cannot identify image file"),
        (str(folder / "sub/c.png"), str(len(CONTENT["sub/c.png"])), "12", "8", ""),
    ]
    assert quarantined_rows(folder) == {str(folder / "b.png"): "cannot identify image file"}


def test_check_command_exit_codes_and_refusals(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)  # where a refused report would be
    assert main([]) == 2
    assert main(["--help"]) == main([str(folder), "-h"]) == 0
    assert capsys.readouterr().out.count("Read every image of a data set once") == 3
    for more in (["x"], ["out=a.csv", "out=b.csv"], ["out=a.csv", "x"]):
        with pytest.raises(UserError, match=f"^{' '.join(more)}: expected a path and at most out=FILE.csv"):
            main([str(folder), *more])
    assert quarantined_rows(folder) == {}, "nothing was read"
    assert main([str(folder)]) == 0
    assert not (folder / "a.csv").exists()


def test_check_image_names_an_error_without_message():
    def fails():
        raise RuntimeError

    assert check_image("x", fails).fault == "RuntimeError()"
